"""A RestartPolicy of a run directory, on a clock of the test's."""

import pytest

from areal_ray.cluster.bad_devices import BadNodes
from areal_ray.controller.restart_policy import RestartPolicy
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage

from .controller_fakes import RAPID_S, Clock, MemoryRequests, worker_count


@pytest.fixture
def run(tmp_path):
    return RunDir(LocalStorage(tmp_path))


@pytest.fixture
def clock():
    """More time passes between failures than would have them waited between."""
    return Clock(step=2 * RAPID_S)


@pytest.fixture
def count(run):
    count = worker_count(MemoryRequests(), run, Clock())
    count.held = []
    count.hold_back = count.held.append
    return count


@pytest.fixture
def make(clock, count, run):
    def make(max_failures=-1, skip=False, max_controller_failures=10):
        return RestartPolicy(
            count, run, BadNodes(run, print), max_failures, skip, print, max_controller_failures, RAPID_S, clock
        )

    return make
