"""What a rank says of itself, and when it leaves by itself."""

import socket
import threading
from functools import partial
from types import SimpleNamespace

import pytest

from areal_ray.config import load
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.worker import sidecars
from areal_ray.worker.watchdog import Stuck

from .test_main import EXPERIMENT

pytestmark = pytest.mark.unit

LIMIT_S = 30


@pytest.fixture
def run(tmp_path):
    run = RunDir(LocalStorage(tmp_path))
    run.event("attempt", attempt=4)
    return run


@pytest.mark.parametrize(("own", "noted"), [(3, 3), (None, 4)])
def test_what_a_late_rank_says_is_about_its_own_attempt(run, monkeypatch, own, noted):
    told = []
    monkeypatch.setattr(sidecars, "Watchdog", lambda limits, stuck: told.append(stuck))
    sidecars.watchdog(load(EXPERIMENT, []), run, SimpleNamespace(rank=1))
    told[0](Stuck("step", 7, 9.0, "here", True, "stacks", own))
    (event,) = run.events("stuck")
    assert event["attempt"] == noted
    assert run.storage.read(f"stacks.a{noted}.rank1.txt") == b"stacks"


@pytest.fixture
def watch(monkeypatch):
    """Watches a head node for as long as a test waits; for the rank of that number on its node."""
    server = socket.create_server(("127.0.0.1", 0))
    place = SimpleNamespace()
    address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(sidecars.ray.train, "get_context", lambda: place)
    monkeypatch.setattr(sidecars.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
    quick = {"say_after_s": 0.0, "lost_after_s": 0.05}
    monkeypatch.setattr(sidecars, "watching", partial(sidecars.watching, **quick))
    monkeypatch.setattr(sidecars, "_LOOK_S", 0.01)

    def watch(local_rank, leave):
        place.get_local_rank = lambda: local_rank
        return sidecars.head_watch(leave)

    yield watch, server
    server.close()


def test_a_rank_that_hears_nothing_from_the_head_node_leaves(watch):
    start, head = watch
    left, status = threading.Event(), []

    def leave(code):
        status.append(code)
        left.set()

    with start(0, leave):
        head.close()
        assert left.wait(LIMIT_S)
    assert status == [sidecars.CUT_OFF]


def test_one_rank_of_each_node_looks(watch, monkeypatch):
    start, _ = watch
    monkeypatch.setattr(sidecars, "watching", None)  # nobody calls it
    with start(1, None):
        pass
