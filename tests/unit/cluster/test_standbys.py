"""Standbys: none where none are wanted, and whatever goes wrong with them, training goes on."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from areal_ray.cluster import standbys
from areal_ray.cluster.ray_internals import setup_hook_variable
from areal_ray.cluster.standbys import Standbys
from areal_ray.config import ClusterConfig, Config
from areal_ray.driver.warm_start import job_environment, worker_environment

pytestmark = pytest.mark.unit


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node whose raylet is `node.prestart`, and on which the processes `node.warm` are ready standbys."""
    node = SimpleNamespace(warm=[], asked=[], reports=[], complaints=[])

    def prestart(count):
        node.asked.append(count)
        node.warm += [100 * len(node.asked) + i for i in range(count)]
        for pid in node.warm:
            (tmp_path / "worker" / str(pid)).touch()

    def process(pid):
        if pid not in node.warm:
            raise standbys.psutil.NoSuchProcess(pid)
        name = "ray::IDLE" if pid != os.getpid() else "ray::RayTrainWorker.execute"
        return SimpleNamespace(cmdline=lambda: [name], memory_full_info=lambda: SimpleNamespace(pss=1000))

    (tmp_path / "worker").mkdir()
    node.prestart = prestart
    monkeypatch.setattr(standbys, "ready_folder", lambda kind: tmp_path / kind)
    monkeypatch.setattr(standbys.psutil, "Process", process)
    monkeypatch.setattr(standbys.psutil, "virtual_memory", lambda: SimpleNamespace(available=64e9, total=64e9))

    def report(*figures):
        node.reports.append(figures)

    def of(count, warm_up_s=120.0):
        start = node.prestart
        return Standbys("worker", count, report, node.complaints.append, warm_up_s, poll_s=0.0, start=start)

    node.of = of
    return node


def test_those_that_are_missing_are_started_and_reported_when_they_are_warm(node):
    node.of(2)._replenish()
    assert node.asked == [2]
    ((ready, memory, seconds),) = node.reports
    assert (ready, memory) == (2, 2000)
    assert seconds >= 0
    node.warm.remove(100)
    node.of(2)._replenish()
    assert node.asked == [2, 1]
    node.of(2)._replenish()
    assert node.asked == [2, 1]
    assert node.complaints == []


def test_a_process_that_trains_is_no_standby(node, tmp_path):
    (tmp_path / "worker" / str(os.getpid())).touch()
    node.warm.append(os.getpid())
    node.of(1)._replenish()
    assert node.asked == [1]


@pytest.mark.parametrize("error", [RuntimeError("method\n not implemented"), AttributeError("no such field")], ids=str)
def test_a_raylet_that_refuses_is_said_in_one_line_and_fails_nothing(node, error):
    def refuse(count):
        raise error

    node.prestart = refuse
    node.of(2)._replenish()
    (line,) = node.complaints
    assert line == (
        f"no standbys, so that a restart takes longer: {type(error).__name__}: {' '.join(str(error).split())}"
    )
    assert node.reports == []


def test_where_memory_is_short_none_are_started(node, monkeypatch):
    monkeypatch.setattr(standbys.psutil, "virtual_memory", lambda: SimpleNamespace(available=7e9, total=64e9))
    node.of(2)._replenish()
    assert node.asked == []
    assert node.complaints == ["no standbys: only 7.0 GB of memory are free on this node"]


def test_those_that_do_not_get_warm_are_not_waited_for_for_ever(node):
    node.prestart = lambda count: None
    node.of(2, warm_up_s=-1.0)._replenish()
    assert node.complaints == ["only 0 of 2 standbys are ready after -1 s"]


@pytest.mark.parametrize(("wanted", "count"), [("auto", 3), ("off", 0), (False, 0), (0, 0), (5, 5)])
def test_as_many_as_are_wanted(wanted, count):
    config = Config(cluster=ClusterConfig(standbys=wanted))
    assert config.standbys(3) == count
    assert bool(job_environment(config)) == bool(worker_environment(config)) == bool(count)


def test_the_environments_differ_or_ray_s_own_actors_would_take_the_workers_standbys():
    config = Config()
    hook = setup_hook_variable()
    assert job_environment(config)[hook] != worker_environment(config)[hook]


WARM_UP = """
import warnings
from pathlib import Path
import torch
import torch.distributed
import areal_ray.worker.main
from areal_ray.engine import warmup
warnings.simplefilter("error")
before = {path.name for path in Path("/proc/self/task").iterdir()}
warmup.warm_up()
print([path.joinpath("comm").read_text() for path in Path("/proc/self/task").iterdir() if path.name not in before])
"""


def test_a_standby_that_has_warmed_up_has_no_group_and_no_thread_that_would_disturb_the_training():
    said = subprocess.run([sys.executable, "-c", WARM_UP], capture_output=True, text=True, timeout=60)
    assert (said.stdout, said.stderr, said.returncode) == ("[]\n", "", 0)
