"""The controller that runs in place of Ray's."""

import asyncio
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from ray.train.v2._internal.execution.controller import TrainController

from areal_ray.cluster import ray_internals
from areal_ray.controller.trainer import ByValue, Controller, Heartbeat

pytestmark = pytest.mark.unit


@pytest.fixture
def controller(monkeypatch):
    """A Controller whose list of checkpoints is written by `write`."""

    def make(write):
        def init(self, failure_policy, **options):
            self._failure_policy = failure_policy
            self._checkpoint_manager = SimpleNamespace(_write_state_to_storage=write)
            self._worker_group_callbacks_to_propagate = []

        monkeypatch.setattr(TrainController, "__init__", init)
        return Controller((None, SimpleNamespace(troubled=False)))

    return make


def test_the_training_function_travels_by_value():
    config = {"steps": 3}

    def train():
        return config

    handed_on = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(ByValue(train)))))  # noqa: S301
    assert handed_on.get()() == config


def test_a_list_of_checkpoints_that_cannot_be_written_is_said_and_stops_nobody(controller, capsys):
    def full():
        raise OSError(28, "No space left on device")

    controller(full)._checkpoint_manager._write_state_to_storage()
    assert "could not write Ray's list of checkpoints: [Errno 28] No space left on device" in capsys.readouterr().out


def test_it_is_written_when_it_can_be(controller):
    written = []
    controller(lambda: written.append(True))._checkpoint_manager._write_state_to_storage()
    assert written == [True]


def test_what_is_wrong_with_the_list_itself_is_raised(controller):
    def wrong():
        raise ValueError("not a list")

    with pytest.raises(ValueError, match="not a list"):
        controller(wrong)._checkpoint_manager._write_state_to_storage()


@pytest.mark.parametrize("fails", [False, True])
def test_at_the_end_nothing_stays_reserved(controller, monkeypatch, fails):
    async def shutdown(self):
        if fails:
            raise RuntimeError("no end")
        return "ended"

    monkeypatch.setattr(TrainController, "_shutdown", shutdown)
    made, given_back = controller(None), []
    made._placement_groups.release = lambda: given_back.append(True)
    with pytest.raises(RuntimeError, match="no end") if fails else nullcontext():
        assert asyncio.run(made._shutdown()) == "ended"
    assert given_back == [True]


@pytest.mark.parametrize("troubled", [False, True])
def test_after_failures_in_a_row_the_workers_may_be_placed_elsewhere(controller, monkeypatch, troubled):
    done = []
    monkeypatch.setattr(
        TrainController, "_start_worker_group", lambda self, *args, **kwargs: done.append((args, kwargs))
    )
    made = controller(None)
    made._failure_policy.troubled = troubled
    made._placement_groups.release = lambda: done.append("given back")
    made._start_worker_group(2, resources_per_worker={"CPU": 1})
    assert done == ["given back"] * troubled + [((2,), {"resources_per_worker": {"CPU": 1}})]


def test_a_start_that_fails_keeps_nothing_reserved(controller, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("no start")

    monkeypatch.setattr(TrainController, "_start_worker_group", fail)
    made, given_back = controller(None), []
    made._placement_groups.release = lambda: given_back.append(True)
    with pytest.raises(RuntimeError, match="no start"):
        made._start_worker_group(2, resources_per_worker={"CPU": 1})
    assert given_back == [True]


class Store:
    """The head node's store: its answer to the next look, or its absence."""

    def __init__(self, monkeypatch):
        self.beat: bytes | None = b"0"
        monkeypatch.setattr(ray_internals, "get", self.get)

    def get(self, key):
        if self.beat == b"away":
            raise ConnectionError("no head")
        return self.beat


def test_a_controller_that_is_stopped_is_noticed_and_no_other(monkeypatch):
    store, clock = Store(monkeypatch), SimpleNamespace(now=0.0)
    heartbeat = Heartbeat("key", limit_s=40.0, every_s=4.0, clock=lambda: clock.now)

    def looks(seconds, beat, step=4.0):
        """For so long, with what is found then; a number: beats that go on."""
        seen = []
        for look in range(int(seconds / step)):
            clock.now += step
            store.beat = str(look).encode() if beat is int else beat
            seen.append(heartbeat.has_stopped())
        return any(seen)

    assert not looks(200, None)  # it has not begun
    assert not looks(200, int)
    assert not looks(36, b"last")
    assert not looks(200, b"away")  # of the head node nothing is known
    assert not looks(36, b"last")
    assert not looks(60, b"last", step=60.0)  # this process was stopped as well
    assert looks(44, b"last")
