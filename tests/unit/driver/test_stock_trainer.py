"""Attempts with Ray's public API alone: how many workers, in which order, and when it is given up."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from areal_ray.cluster.bad_devices import BadDevice, DeviceName
from areal_ray.cluster.requests import PlannedRestart, StoppedWhileWaiting
from areal_ray.config import load
from areal_ray.driver import stock_trainer
from areal_ray.driver.stock_trainer import StockTrainer
from areal_ray.run import JobContext, RunDir
from areal_ray.storage import LocalStorage
from tests.unit.controller.controller_fakes import MemoryRequests

pytestmark = pytest.mark.unit

EXPERIMENT = str(Path(__file__).parents[3] / "conf/experiments/tiny.yaml")
DIED = WorkerGroupError("failed", {0: ActorDiedError()})
LEFT = WorkerGroupError("failed", {0: PlannedRestart("resize")})
NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError(2))


class Job:
    """A StockTrainer whose attempts end as `ends` says: with an exception, or an outcome."""

    def __init__(self, trainer, run, requests):
        self.trainer, self.run, self.requests = trainer, run, requests
        self.sizes, self.lists, self.ends = [], [], []
        trainer._trainer = self._start

    def _start(self, size):
        self.sizes.append(size)
        self.lists.append(self.run.storage.size("checkpoint_manager_snapshot.json"))
        self.run.storage.replace("checkpoint_manager_snapshot.json", b"{to")  # torn
        return SimpleNamespace(fit=self._fit)

    def _fit(self):
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return SimpleNamespace(return_value=end)

    def fit(self, *ends):
        self.ends = list(ends)
        return self.trainer.fit()


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Makes a job on two nodes with one core each; overrides as arguments."""
    requests, asked = MemoryRequests(), []
    nodes = [{"NodeID": "n", "Alive": alive, "Resources": {"CPU": 1.0}} for alive in (True, True, False)]
    monkeypatch.setattr(stock_trainer, "requests_to", lambda *_, **__: requests)
    monkeypatch.setattr(stock_trainer.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(stock_trainer, "request_resources", lambda bundles: asked.append(bundles))

    def make(*overrides):
        config = load(EXPERIMENT, [f"run.storage_path={tmp_path}", *overrides])
        run = RunDir(LocalStorage(tmp_path))
        trainer = StockTrainer(config, JobContext(run, "it", False), lambda: {}, {}, {}, pause_s=0.0)
        made = Job(trainer, run, requests)
        made.nodes, made.asked = nodes, asked
        return made

    return make


def test_a_failure_is_followed_by_another_attempt_without_ray_s_list_of_checkpoints(job):
    made = job()
    assert made.fit(DIED, DIED, {"step": 3}) == {"step": 3}
    assert made.sizes == [2, 2, 2]
    assert made.lists == [None] * 3


def test_as_many_workers_as_there_is_room_for_begin_and_fewer_when_they_are_not_placed(job):
    made = job("cluster.num_workers=[1,4]")
    assert made.fit(NO_ROOM, {"step": 3}) == {"step": 3}
    assert made.sizes == [2, 1]


def test_failures_are_counted_and_planned_restarts_are_not(job):
    made = job("cluster.max_failures=1")
    with pytest.raises(TrainingFailedError):
        made.fit(LEFT, LEFT, DIED, LEFT, DIED, {"step": 3})
    assert len(made.sizes) == 5


def test_a_controller_that_dies_is_the_supervisor_s_business(job):
    made = job()
    with pytest.raises(ActorDiedError):
        made.fit(ActorDiedError())


def test_to_stop_is_heard_between_attempts(job):
    made = job()
    made.requests.reason = "stop"
    with pytest.raises(StoppedWhileWaiting):
        made.fit({"step": 3})
    assert made.sizes == []


def test_machines_are_asked_for_while_there_is_no_room_and_no_longer(job, monkeypatch):
    made = job("cluster.num_workers=[4,8]", "cluster.resources_per_worker={GPU: 0, big: 1}")
    present = iter([made.nodes, made.nodes, [{"NodeID": "n", "Alive": True, "Resources": {"CPU": 8.0, "big": 5.0}}]])
    monkeypatch.setattr(stock_trainer.ray, "nodes", lambda: next(present))
    assert made.fit({"step": 3}) == {"step": 3}
    assert made.sizes == [4]
    assert made.asked == [[{"CPU": 1, "big": 1}] * 8] * 2 + [[]]


def test_where_there_is_room_no_machines_are_asked_for(job):
    made = job()
    made.fit(DIED, {"step": 3})
    assert made.asked == []


def test_who_is_stopped_while_waiting_takes_the_request_for_machines_back(job, monkeypatch):
    made = job("cluster.num_workers=4")
    asked = made.asked.append
    monkeypatch.setattr(stock_trainer, "request_resources", lambda bundles: (asked(bundles), stop()))

    def stop():
        made.requests.reason = "stop"

    with pytest.raises(StoppedWhileWaiting):
        made.fit({"step": 3})
    assert made.asked == [[{"CPU": 1}] * 4, []]


def test_a_node_whose_device_fails_twice_is_left_out(job, capsys):
    made = job("cluster.num_workers=[1,2]")
    first, second, _ = made.nodes
    first |= {"NodeID": "id-a", "NodeManagerHostname": "a"}
    second |= {"NodeID": "id-b", "NodeManagerHostname": "b"}
    bad = WorkerGroupError("failed", {1: BadDevice(DeviceName("b", "id-b", 0, "GPU-1"), "ECC")})
    made.fit(bad, bad, {"step": 3})
    assert made.sizes == [2, 2, 1]
    scaling = StockTrainer._trainer(made.trainer, 1).scaling_config
    assert scaling.label_selector == {"ray.io/node-id": "!in(id-b)"}
    assert "b has failed twice and is left out from now on" in capsys.readouterr().out
