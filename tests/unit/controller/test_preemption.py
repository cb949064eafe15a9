"""Workers hear of a machine that is about to be taken away."""

import threading
from types import SimpleNamespace

import pytest
import ray

from areal_ray.controller.preemption import ThreadedPreemptionCallback

pytestmark = pytest.mark.unit

LIMIT_S = 30


class Worker:
    def __init__(self, rank, node):
        self.told, self.heard = [], threading.Event()
        self.distributed_context, self.metadata = SimpleNamespace(world_rank=rank), SimpleNamespace(node_id=node)
        self.actor = SimpleNamespace(mark_preempt=SimpleNamespace(remote=self._tell))

    def _tell(self, info):
        self.told.append(info.preempted_node_to_ranks)
        self.heard.set()


@pytest.fixture
def preemption(monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.01")
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": name, "Labels": {}} for name in "abc"])
    made = ThreadedPreemptionCallback()
    yield made
    made._stop_watcher()


def test_all_workers_are_told_which_of_them_are_on_a_node_that_goes(preemption, monkeypatch):
    draining = {"c": 0}  # where this job has no workers
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: draining)
    workers = [Worker(0, "a"), Worker(1, "b"), Worker(2, "b")]
    preemption.after_worker_group_start(SimpleNamespace(get_workers=lambda: workers))
    draining = {"c": 0, "b": 0}
    assert all(worker.heard.wait(LIMIT_S) for worker in workers)
    assert [worker.told for worker in workers] == [[{"b": [1, 2]}]] * 3


@pytest.mark.parametrize(
    "how", ["before_worker_group_shutdown", "after_worker_group_abort", "after_worker_group_start"]
)
def test_the_watching_ends_with_the_group(preemption, monkeypatch, how):
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", dict)
    group = SimpleNamespace(get_workers=lambda: [Worker(0, "a")])
    preemption.after_worker_group_start(group)
    thread = preemption._watcher._monitor_thread
    assert thread.is_alive()
    getattr(preemption, how)(group)
    thread.join(LIMIT_S)
    assert not thread.is_alive()
