"""The watch for nodes that are taken away, which ends with its group of workers."""

from types import SimpleNamespace

import pytest
import ray

from areal_ray.controller.preemption import ThreadedPreemptionCallback

pytestmark = pytest.mark.unit

LIMIT_S = 30


@pytest.fixture
def preemption(monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.01")
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": name, "Labels": {}} for name in "abc"])
    made = ThreadedPreemptionCallback()
    yield made
    made._stop_watcher()


@pytest.mark.parametrize(
    "how", ["before_worker_group_shutdown", "after_worker_group_abort", "after_worker_group_start"]
)
def test_the_watching_ends_with_the_group(preemption, monkeypatch, how):
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", dict)
    places = {"distributed_context": SimpleNamespace(world_rank=0), "metadata": SimpleNamespace(node_id="a")}
    worker = SimpleNamespace(**places, actor=None)
    group = SimpleNamespace(get_workers=lambda: [worker])
    preemption.after_worker_group_start(group)
    thread = preemption._watcher._monitor_thread
    assert thread.is_alive()
    getattr(preemption, how)(group)
    thread.join(LIMIT_S)
    assert not thread.is_alive()
