"""What a process has started ends when it is killed, and not when it ends in good order."""

import subprocess
import sys

import psutil
import pytest

from areal_ray.processes.own_session import children_in_own_session
from areal_ray.processes.reaper import Reaper

pytestmark = pytest.mark.unit

# Prints the id of what it starts, a process with a child of its own, as a raylet has.
PARENT = """
import subprocess, sys
from areal_ray.processes.own_session import children_in_own_session
from areal_ray.processes.reaper import Reaper
with children_in_own_session() as groups:
    child = subprocess.Popen(["/bin/sh", "-c", "sleep 1000 & echo $! $$; wait"], stdout=subprocess.PIPE, text=True)
started = child.stdout.readline()
reaper = Reaper(groups)
print(started, end="", flush=True)  # not before: what is killed sooner leaves them
sys.stdin.read()
"""


def test_all_that_a_killed_process_has_left_is_killed():
    pipe = subprocess.PIPE
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=pipe, stdout=pipe, text=True)
    left = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    assert psutil.wait_procs(left, timeout=30)[1] == []


def test_nothing_is_killed_once_it_is_called_off():
    with children_in_own_session() as groups:
        child = subprocess.Popen(["sleep", "1000"])
    try:
        Reaper(groups).close()
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
