"""Preparing a corpus on a cluster: the bytes of one process, though tasks are killed; errors as they were raised."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data import build_tokenizer
from areal_ray.data.corpus import planning, prepare
from areal_ray.data.corpus.ray_prepare import on_cluster
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.ray


def test_tasks_give_the_same_bytes_though_one_is_killed_and_raise_what_a_source_raises(
    ray_cluster, tmp_path, monkeypatch
):
    class Harmful:
        """Kills its process in the middle of a file, once, or finds that it cannot be read; sent by value."""

        def __init__(self, source, marker, fails):
            self.source, self.marker, self.fails = source, marker, fails
            self.notes, self.skipped = [], source.skipped

        def read(self, part):
            if part.path.endswith("07.txt"):
                if self.fails:
                    raise ConfigError("data.paths", f"{part.path} is no text")
                if not os.path.exists(self.marker):
                    Path(self.marker).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            yield from self.source.read(part)

    monkeypatch.setattr(planning, "GROUP_BYTES", 300)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i:02}.txt").write_bytes(bytes([i]) * (37 + i))

    def prepared(folder, map_groups, fails=None):
        config = DataConfig(source="text", paths=[str(text)], held_out=0.25)
        plan = planning.make_plan(config, build_tokenizer("bytes"), LocalStorage(tmp_path / folder))
        if fails is not None:
            harmful = Harmful(plan.work.source, str(tmp_path / "marker"), fails)
            plan = replace(plan, work=replace(plan.work, source=harmful))
        prepare.prepare(plan, map_groups, print)
        (corpus,) = (tmp_path / folder).iterdir()
        return {path.name: path.read_bytes() for path in corpus.iterdir()}

    expected = prepared("here", prepare.in_process)
    assert prepared("there", on_cluster, fails=False) == expected
    assert (tmp_path / "marker").exists()
    with pytest.raises(ConfigError, match=r"07\.txt is no text") as caught:
        prepared("nowhere", on_cluster, fails=True)
    assert caught.value.key == "data.paths"
