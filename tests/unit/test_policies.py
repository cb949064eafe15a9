"""What the controller decides: how many workers, and whether a failure restarts them."""

from types import SimpleNamespace

import pytest
from ray.train import ControllerError, FailureConfig, ScalingConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from areal_ray import policies
from areal_ray.control import PlannedRestart
from areal_ray.guard import BadStepError
from areal_ray.policies import Restarts, StoppedWhileWaiting, WorkerCount
from areal_ray.rundir import RunDir
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit


class Control:
    """What was asked for, in memory."""

    def __init__(self):
        self.reason, self.asks, self.away = None, [], False

    def ask(self, reason):
        self.asks.append(reason)

    def asked(self):
        if self.away:
            raise ConnectionError("no head node")
        return self.reason

    def done(self): ...


class Count(WorkerCount):
    """A WorkerCount that is told how much room there is."""

    def __init__(self, control, recipe, sizes=(1, 2, 4)):
        super().__init__(ScalingConfig(num_workers=(sizes[0], sizes[-1])), sizes, control, recipe)
        self.room, self.free = 0, 8

    def _maybe_send_resource_request(self): ...

    def _room(self):
        return self.room

    def _free(self):
        return self.free

    def start(self):
        decision = self.make_decision_for_non_running_worker_group()
        return decision.num_workers if isinstance(decision, ResizeDecision) else None

    def look(self, running):
        self._looked = float("-inf")
        state = SimpleNamespace(num_workers=running, start_time=float("-inf"))
        assert isinstance(self.make_decision_for_running_worker_group(state, None), NoopDecision)


@pytest.fixture
def control():
    return Control()


@pytest.fixture
def run(tmp_path):
    return RunDir(LocalStorage(tmp_path))


@pytest.fixture
def count(control, run, monkeypatch):
    monkeypatch.setattr(policies, "_PAUSE_S", 0.0)
    monkeypatch.setattr(policies, "_LOOK_S", 0.0)
    return Count(control, run.storage.recipe)


@pytest.mark.parametrize(("room", "started"), [(1, 1), (2, 2), (3, 2), (4, 4), (9, 4)])
def test_the_largest_usable_number_that_there_is_room_for_starts(count, room, started):
    count.room = room
    assert count.start() == started


def test_waiting_says_what_there_is_and_what_is_needed_once(count, run, capsys):
    assert [count.start() for _ in range(3)] == [None, None, None]
    assert capsys.readouterr().out.count("has room for 0 workers of {'CPU': 1}, needed are 1") == 1
    (event,) = run.events("waiting")
    assert (event["room"], event["needed"]) == (0, 1)


def test_to_stop_ends_the_waiting(count, control):
    control.reason = "stop"
    with pytest.raises(StoppedWhileWaiting):
        count.start()


def test_a_head_node_that_is_away_is_waited_for(count, control, capsys):
    control.away, count.room = True, 2
    assert count.start() is None
    assert "does not answer" in capsys.readouterr().out
    control.away = False
    assert count.start() == 2


def test_workers_are_asked_to_make_room_for_more_when_it_lasts(count, control):
    count.room = 4
    count.look(running=2)
    assert control.asks == []
    count.look(running=2)
    count.look(running=2)
    assert control.asks == ["resize"]


@pytest.mark.parametrize(("room", "free"), [(2, 8), (3, 8), (4, 1), (8, 0)])
def test_nothing_is_asked_for_without_room_for_a_larger_number(count, control, room, free):
    count.room, count.free = room, free
    for _ in range(3):
        count.look(running=2)
    assert control.asks == []


def test_fewer_are_tried_when_so_many_could_not_be_started(count):
    count.room = 4
    assert count.start() == 4
    assert count.not_placed() == 4
    assert count.start() == 2
    assert count.not_placed() == 2
    assert count.start() == 1


@pytest.fixture
def restarts(count, run):
    return Restarts(FailureConfig(max_failures=1), count, run.storage.recipe)


def workers(*errors):
    return WorkerGroupError("failed", dict(enumerate(errors)))


def test_leaving_on_request_is_no_failure(restarts):
    for _ in range(5):
        left = workers(PlannedRestart("resize"), RuntimeError("Connection closed by peer"))
        assert restarts.make_decision(left) == FailureDecision.RETRY


def test_failures_are_counted_up_to_their_limit(restarts):
    decisions = [restarts.make_decision(workers(RuntimeError("broken"))) for _ in range(2)]
    assert decisions == [FailureDecision.RETRY, FailureDecision.RAISE]


def test_a_step_that_is_to_stop_the_run_stops_it(restarts):
    bad = workers(BadStepError("step 7"), BadStepError("step 7"))
    assert restarts.make_decision(bad) == FailureDecision.RAISE


def test_storage_that_fails_the_controller_does_not_end_the_run_at_once(restarts, run, monkeypatch):
    monkeypatch.setattr(policies, "_TROUBLES", 2)
    full = ControllerError(OSError(28, "No space left on device"))
    decisions = [restarts.make_decision(full) for _ in range(3)]
    assert decisions == [FailureDecision.RETRY, FailureDecision.RETRY, FailureDecision.RAISE]
    assert len(run.events("controller_trouble")) == 2


def test_workers_that_could_not_be_placed_are_said_and_fewer_are_tried(restarts, count, capsys):
    count.room = 2
    assert count.start() == 2
    assert restarts.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2))) == FailureDecision.RETRY
    assert "2 workers could not be started" in capsys.readouterr().out
    assert count.start() == 1
