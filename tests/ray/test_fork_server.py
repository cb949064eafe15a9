"""Processes of a Ray job that are forks of a fork server: still two different ones, and Ray notices their ends."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR

from areal_ray.cluster import standbys
from areal_ray.processes import fork_server_main

pytestmark = pytest.mark.ray

LIMIT_S = 60


@ray.remote(num_cpus=0)
class Process:
    def __init__(self):
        self.imported = "transformers" in sys.modules

    def say(self):
        from ray._raylet import WorkerID

        parent = psutil.Process().parent()
        return {
            "pid": os.getpid(),
            "parent": parent.cmdline() if parent else [],
            "imported": self.imported,
            "warmed_up": sys.modules["areal_ray.engine.warmup"].warm_up.cache_info().currsize,
            "of the config": [os.environ.get("OF_THE_CONFIG"), parent and parent.environ().get("OF_THE_CONFIG")],
            "malloc": os.environ.get("GLIBC_TUNABLES"),
            "id": ray.get_runtime_context().get_worker_id(),
            "next": WorkerID.from_random().hex(),  # Ray's C++ part draws random numbers of its own
        }


def test_the_processes_of_a_job_are_forks_that_know_who_they_are(ray_cluster):
    # As trainer.py starts the controller, with variables of its own.
    variables = {"env_vars": {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0", "RAY_TRAIN_X": "1"}}
    processes = Process.remote(), Process.options(runtime_env=variables).remote()
    one, other = ray.get([process.say.remote() for process in processes])
    for process in (one, other):
        assert fork_server_main.__file__ in process["parent"]
        assert process["imported"]
        assert process["warmed_up"] == 1
        assert process["of the config"] == ["seen", "seen"]  # the fork server, too: before the first import
        assert process["malloc"] == "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"
    for what in ("pid", "id", "next"):
        assert one[what] != other[what]


def test_the_end_of_one_is_noticed(ray_cluster):
    process = Process.remote()
    pid = ray.get(process.say.remote())["pid"]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(process.say.remote(), timeout=LIMIT_S)


def test_one_that_ray_ends_is_gone(ray_cluster):
    process = Process.remote()
    fork = psutil.Process(ray.get(process.say.remote())["pid"])
    ray.kill(process)
    _, alive = psutil.wait_procs([fork], timeout=LIMIT_S)
    assert alive == []


def forks():
    """Process ids of the forks of fork servers that Ray knows."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            parent = process.parent()
            if parent and fork_server_main.__file__ in parent.cmdline() and process.cmdline()[0].startswith("ray::"):
                found.add(process.pid)
    return found


def test_the_controller_takes_a_process_that_was_started_ahead(ray_cluster, run):
    before = forks()
    standbys.prestart(1)
    give_up = time.monotonic() + LIMIT_S
    while not (ahead := forks() - before) and time.monotonic() < give_up:
        time.sleep(0.1)
    (process,) = (psutil.Process(pid) for pid in ahead)
    titles, over = set(), threading.Event()

    def watch():
        with suppress(psutil.NoSuchProcess):
            while not over.wait(0.02):
                titles.update(process.cmdline()[:1])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert run.train("train.stop_at=2") == 0
    finally:
        over.set()
        watcher.join()
    assert any("Controller" in title for title in titles)
