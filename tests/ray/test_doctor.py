"""What the doctor says of a node on which something is set wrong: of a real cluster, whose node is asked by a task."""

import re
import time
from types import SimpleNamespace

import pytest

from areal_ray.config import load
from areal_ray.storage import LocalStorage
from areal_ray.tools.doctor import estimate, node_findings, nodes

from .conftest import EXPERIMENT, SMALL

pytestmark = pytest.mark.ray


class Elsewhere(LocalStorage):
    """A folder of the driver's, in whose place the nodes have another one."""

    def __init__(self, path, there):
        super().__init__(path)
        self._there = there

    def __reduce__(self):
        return LocalStorage, (self._there,)


def not_shared(monkeypatch, folder):
    (folder / "there").mkdir()
    return Elsewhere(folder / "here", str(folder / "there"))


def an_hour_ahead(monkeypatch, folder):
    monkeypatch.setattr(nodes, "time", SimpleNamespace(time=lambda: time.time() + 3600))


def other_torch(monkeypatch, folder):
    here = nodes.versions() | {"torch": "1.0"}
    monkeypatch.setattr(nodes, "versions", lambda: here)


def no_package(monkeypatch, folder):
    """The task's code is in a folder that the nodes do not have."""
    (folder / "only_here.py").write_text("def look(*_):\n    return {}\n")
    monkeypatch.syspath_prepend(folder)
    import only_here

    monkeypatch.setattr(nodes, "look", only_here.look)


FAULTS = {
    "nothing": (lambda *_: None, "ok", r"same versions, sees the storage"),
    "a path that only the driver sees": (not_shared, "bad", r"it is not shared\. Mount one file system at that path"),
    "clocks apart": (an_hour_ahead, "note", r"its clock is 3[56]\d\d s from this one: .*Set both by NTP"),
    "other versions": (other_torch, "bad", r"torch 2\S+ \(here 1\.0\)\. Give all nodes and the driver one image"),
    "no package": (no_package, "bad", r"cannot run a task of this package: .*only_here.*Install it there"),
    "no room": (lambda *_: None, "bad", r"1 with room for 0 workers .* takes 2: add nodes, or a smaller"),
}


def test_what_is_set_wrong_on_a_node_has_a_line_that_says_what_to_do(ray_cluster, tmp_path):
    for number, (fault, (wrong, state, line)) in enumerate(FAULTS.items()):
        folder = tmp_path / str(number)
        (folder / "here").mkdir(parents=True)
        more = ["cluster.resources_per_worker={CPU: 1000}"] if fault == "no room" else []
        config = load(EXPERIMENT, [*SMALL, *more])
        with pytest.MonkeyPatch.context() as monkeypatch:
            storage = wrong(monkeypatch, folder) or LocalStorage(folder / "here")
            found = list(node_findings(config, storage, estimate))
        matching = [each for each in found if re.search(line, each.text)]
        print(f"{fault}:\n    {[f'{each.state}: {each.text}' for each in matching or found]}")
        assert [each.state for each in matching] == [state], (fault, found)
        assert storage.names() == []
