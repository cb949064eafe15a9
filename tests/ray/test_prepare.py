"""Preparing a corpus in many processes: the bytes of one, though some are killed; errors as they were raised."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data import build_tokenizer
from areal_ray.data.corpus import planning, prepare
from areal_ray.data.corpus.process_prepare import ProcessPool
from areal_ray.driver.ray_prepare import on_cluster
from areal_ray.storage import LocalStorage

from .conftest import EXPERIMENT, ROOT

pytestmark = pytest.mark.ray


class Harmful:
    """Kills its process in the middle of a file, as often as it is told, or finds that it cannot be read."""

    def __init__(self, source, marks, kills, fails=False):
        self.source, self.marks, self.kills, self.fails = source, marks, kills, fails
        self.notes, self.skipped = [], source.skipped

    def read(self, part):
        if part.path.endswith("07.txt"):
            if self.fails:
                raise ConfigError("data.paths", f"{part.path} is no text")
            marks = Path(self.marks)
            if (killed := len(list(marks.iterdir()))) < self.kills:
                (marks / str(killed)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        yield from self.source.read(part)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Prepares twenty files, each a group or two of its own, and reads what came of it."""
    monkeypatch.setattr(planning, "GROUP_BYTES", 300)
    text = tmp_path / "text"
    text.mkdir()
    (tmp_path / "marks").mkdir()
    for i in range(20):
        (text / f"{i:02}.txt").write_bytes(bytes([i]) * (37 + i))

    def run(folder, map_groups, kind=Harmful, **harm):
        config = DataConfig(source="text", paths=[str(text)], held_out=0.25)
        plan = planning.make_plan(config, build_tokenizer("bytes"), LocalStorage(tmp_path / folder))
        if harm:
            harmful = kind(plan.work.source, str(tmp_path / "marks"), **harm)
            plan = replace(plan, work=replace(plan.work, source=harmful))
        prepare.prepare(plan, map_groups, print)
        (corpus,) = (tmp_path / folder).iterdir()
        return {path.name: path.read_bytes() for path in corpus.iterdir()}

    return run


class Deadly:
    """Ends the process that it is sent to, as often as it is told."""

    def __init__(self, marks, kills):
        self.marks, self.kills = marks, kills

    def __setstate__(self, state):
        marks = Path(state["marks"])
        if (killed := len(list(marks.iterdir()))) < state["kills"]:
            (marks / str(killed)).touch()
            os._exit(1)


class DeadlyWhenSent:
    """A source that may end the process that it is sent to, before more of it is read than a pipe holds."""

    def __init__(self, source, marks, kills):
        self.source, self.notes, self.skipped = source, [], source.skipped
        self.deadly, self.padding = Deadly(marks, kills), b"0" * (1 << 20)

    def read(self, part):
        yield from self.source.read(part)


@pytest.fixture
def map_groups(request):
    if request.param is on_cluster:
        request.getfixturevalue("ray_cluster")
    return request.param


@pytest.mark.parametrize("map_groups", [on_cluster, ProcessPool(print)], indirect=True, ids=["cluster", "pool"])
def test_processes_give_the_same_bytes_though_one_is_killed_and_raise_what_a_source_raises(
    map_groups, prepared, tmp_path
):
    expected = prepared("here", prepare.in_process)
    assert prepared("there", map_groups, kills=2) == expected
    assert len(list((tmp_path / "marks").iterdir())) == 2
    with pytest.raises(ConfigError, match=r"07\.txt is no text") as caught:
        prepared("nowhere", map_groups, kills=0, fails=True)
    assert caught.value.key == "data.paths"
    there = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert not [child for child in there if "spawn_main" in " ".join(child.cmdline())]


def test_a_lost_node_costs_the_groups_that_it_had_in_work(prepared, tmp_path):
    expected = prepared("here", prepare.in_process)
    command = [sys.executable, "-m", "tests.ray.prepare_nodes_script", str(tmp_path / "text"), str(tmp_path / "there")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (corpus,) = (tmp_path / "there").iterdir()
    found = {path.name: path.read_bytes() for path in corpus.iterdir()}
    assert found == expected, sorted(found)


def test_a_process_that_dies_of_what_it_is_sent_is_not_waited_for(prepared):
    expected = prepared("here", prepare.in_process)
    assert prepared("there", ProcessPool(print), kind=DeadlyWhenSent, kills=1) == expected


def test_half_as_many_processes_go_on_after_a_death_and_many_deaths_end_it(prepared, capsys):
    with pytest.raises(ConfigError, match="die again and again"):
        prepared("there", ProcessPool(print, most=4), kills=1000)
    said = [line for line in capsys.readouterr().out.splitlines() if "was killed" in line]
    assert [line.rpartition(" ")[2] for line in said[:2]] == ["2", "1"]


def test_processes_end_with_the_one_that_is_killed_and_what_they_finished_is_used(tmp_path):
    """The whole command, killed with -9 in the middle: nobody is left, and the next one goes on."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(150):
        (text / f"{i:03}.txt").write_bytes(os.urandom(500_000).hex().encode())
    own = ["data=text", f"data.paths=[{text}]", "data.prepare_in_process_mb=1", f"run.storage_path={tmp_path}/runs"]
    command = [sys.executable, "-m", "areal_ray.cli.main", "prepare", "--config", EXPERIMENT, *own]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as killed:
        assert b"in processes of this machine" in killed.stdout.readline()
        while not list(tmp_path.glob("runs/data/*/*.done")):
            assert killed.poll() is None
        started = psutil.Process(killed.pid).children(recursive=True)
        killed.kill()
    gone, left = psutil.wait_procs(started, timeout=60)
    assert gone
    assert not left
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert "150 documents" in ran.stdout
    assert not ran.stderr
