"""What looks after a worker: its GPU is free before it begins."""

import os
import signal
import socket
import subprocess
import sys
import threading

import psutil
import pytest

from areal_ray import care
from areal_ray.ranks import Ranks
from areal_ray.rundir import RunDir
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit

HERE = socket.gethostname()
LIMIT_S = 30


@pytest.fixture
def run(tmp_path):
    return RunDir(LocalStorage(tmp_path))


@pytest.fixture
def living():
    """A process that lives until it is ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def waits(run, patience_s=LIMIT_S):
    thread = threading.Thread(target=care.wait_for_the_last, args=(run, Ranks(), patience_s))
    thread.start()
    return thread


def test_workers_of_the_last_attempt_on_this_machine_are_waited_for(run, living):
    run.note("attempt", print, nodes=["elsewhere", HERE], pids=[os.getpid(), living.pid])
    thread = waits(run)
    assert thread.is_alive()
    os.kill(living.pid, signal.SIGKILL)
    living.wait()
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_not_for_ever(run, living):
    run.note("attempt", print, nodes=[HERE], pids=[living.pid])
    care.wait_for_the_last(run, Ranks(), patience_s=0.1)
    assert living.poll() is None


@pytest.mark.parametrize("case", ["first attempt", "elsewhere", "gone", "another process by now"])
def test_nobody_else_is_waited_for(run, living, case, monkeypatch):
    nobody = 2**22 + 1  # above the largest process id of Linux
    node, pid = {"elsewhere": ("elsewhere", living.pid), "gone": (HERE, nobody)}.get(case, (HERE, living.pid))
    if case == "another process by now":
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: float("inf"))
    if case != "first attempt":
        run.note("attempt", print, nodes=[node], pids=[pid])
    waited = []
    monkeypatch.setattr(care.psutil, "wait_procs", lambda processes, timeout: waited.extend(processes))
    care.wait_for_the_last(run, Ranks())
    assert waited == []
