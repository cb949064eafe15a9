"""The table of the faults of `areal-ray chaos`: which are possible where, and when a run has survived one."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from areal_ray.cli.main import main as run_cli
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.tools.chaos import faults, network, unreadable
from areal_ray.tools.chaos.kinds import KINDS, Here, possible, survived
from areal_ray.tools.chaos.world import World

pytestmark = pytest.mark.unit
ALL = Here(workers=2, mounts=True, own_storage=True, storage_process=1, memory_groups=True, compiler=True)
NOTHING = Here(workers=1, mounts=False, own_storage=False, storage_process=None, memory_groups=False, compiler=False)


def test_there_are_many_kinds_and_all_are_possible_where_there_is_all():
    kinds, lacking = possible(KINDS, ALL, ())
    assert kinds == list(KINDS)
    assert len(kinds) >= 28
    assert not lacking


def test_what_is_not_here_is_left_out_by_name():
    kinds, lacking = possible(KINDS, NOTHING, ())
    assert set(kinds) | set(lacking) == set(KINDS)
    assert not set(kinds) & set(lacking)
    assert lacking["a worker has no memory"] == "a memory cgroup that can be written"
    assert lacking["the disk is full"] == "a small disk, which takes root and no run.storage_path"
    assert lacking["SIGKILL of a raylet"] == "a second worker"
    assert "the file system is read-only" in possible(KINDS, dataclasses.replace(ALL, own_storage=False), ())[1]


def test_one_that_is_named_must_be_possible():
    assert possible(KINDS, NOTHING, ["SIGKILL of rank 0"])[0] == ["SIGKILL of rank 0"]
    with pytest.raises(RuntimeError, match=r"no such faults here: a node is lost; there are: SIGKILL of a worker, "):
        possible(KINDS, NOTHING, ["a node is lost"])


@pytest.mark.skipif(not unreadable.compiler(), reason="needs gcc")
def test_what_is_to_be_refused_cannot_be_opened_and_everything_else_can(tmp_path, monkeypatch):
    for name in ("LD_PRELOAD", "AREAL_RAY_CHAOS_REFUSE"):
        monkeypatch.setenv(name, "")
    order = unreadable.install(tmp_path)
    program = (
        "import sys\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(open(path, 'a+').closed)\n"
        "    except OSError as error: print(error.errno)\n"
    )

    def opened():
        paths = [str(tmp_path / name) for name in ("shard-00000.distcp", "state.json")]
        done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert opened() == ["False", "False"]
    order.write_text(f"5 {tmp_path}/shard-")
    assert opened() == ["5", "False"]


def test_machines_of_a_network_see_no_other_storage(capsys):
    assert run_cli(["chaos", "--machines", "--config", "conf/experiments/tiny.yaml", "run.storage_path=s3://a/b"]) == 2
    assert "run.storage_path: with --machines is below --folder" in capsys.readouterr().err


def test_a_driver_starts_when_another_head_answers(monkeypatch):
    monkeypatch.setattr(network, "_AWAY_S", 0.0)
    calls = []
    head = SimpleNamespace(off=lambda: calls.append("off"))
    machines = SimpleNamespace(
        head=head, another_head=lambda: calls.append("another"), wait_for_nodes=lambda n: calls.append(f"wait for {n}")
    )
    world = SimpleNamespace(
        machines=machines, hit=lambda: calls.append("hit"), start_driver=lambda: calls.append("start")
    )
    network.Network.replace_head(world)
    assert calls == ["hit", "off", "another", "wait for 1", "start"]


def test_a_kill_that_finds_no_worker_hits_nobody():
    faults.one(signal.SIGKILL, SimpleNamespace(workers=lambda: []), random.Random(0))


@pytest.fixture
def world(tmp_path):
    run = RunDir(LocalStorage(tmp_path))
    run.event("attempt", attempt=1)
    run.event("training", attempt=1)
    return SimpleNamespace(run=run, seen={"step-00000010.a1": 100.0})


def test_a_run_has_survived_when_its_newest_attempt_trains(world):
    kind = KINDS["SIGKILL of a worker"]
    (trained,) = world.run.events("training")
    assert survived(kind, world, trained["time"] - 1)
    assert not survived(kind, world, trained["time"] + 1)
    world.run.event("attempt", attempt=2)
    assert not survived(kind, world, trained["time"] - 1)


def test_where_nobody_starts_again_it_has_survived_with_a_checkpoint_later(world):
    kind = KINDS["SIGSTOP of a raylet for 5 s"]
    (trained,) = world.run.events("training")
    since = trained["time"] + 1
    assert not survived(kind, world, since)
    world.seen["step-00000020.a1"] = since + 1
    assert survived(kind, world, since)
    assert not survived(KINDS["SIGKILL of a worker"], world, since)


def test_helpers_are_found_by_whom_they_serve_and_no_stranger_s():
    program = "import sys; print(flush=True); sys.stdin.read()"
    script = "areal_ray.processes.memory_keeper"
    pipes = {"stdin": -1, "stdout": -1}
    mine = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    # A keeper is no child of the world's; here the next two are told apart by their arguments alone.
    helper = psutil.Popen([sys.executable, "-c", program, script, str(mine.pid), "0"], **pipes)
    stranger = psutil.Popen([sys.executable, "-c", program, script, str(os.getppid()), "0", str(mine.pid)], **pipes)
    try:
        for each in (helper, stranger):
            each.stdout.readline()
        found = World.helpers(SimpleNamespace(descendants=lambda: {mine.pid}), script)
        assert found == {helper.pid}
    finally:
        for each in (mine, helper, stranger):
            each.kill()
            each.wait()
            for pipe in (each.stdin, each.stdout):
                if pipe is not None:
                    pipe.close()
