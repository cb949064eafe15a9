"""Deaths before the first step: so many in the same phase end the run; what is no death, or progress, does not."""

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from areal_ray.checkpoint import Catalog
from areal_ray.cluster.bad_devices import BadNodes
from areal_ray.controller.restart_policy import RestartPolicy
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from tests.unit.checkpoint.boxes import save_box

from .controller_fakes import RAISE, RAPID_S, RESET, RETRY, Clock, MemoryRequests, decide, failed, worker_count

pytestmark = pytest.mark.unit

LIMIT = 20
SEGFAULT = failed(ActorDiedError(), RESET, step=None)
PHASES = {"building of the model": (), "restore": ("attempt",), "first step": ("attempt", "restored")}


@pytest.fixture
def run(tmp_path):
    run = RunDir(LocalStorage(tmp_path))
    run.event("submitted")
    return run


@pytest.fixture
def policy(run):
    count = worker_count(MemoryRequests(), run, Clock())
    count.hold_back = lambda _: None
    return RestartPolicy(count, run, BadNodes(run, print), -1, False, print, clock=Clock(step=2 * RAPID_S))


class Starts:
    """Starts of the workers, each of which writes these events before it ends."""

    def __init__(self, run, policy, first=1):
        self.run, self.policy, self.attempt = run, policy, first

    def die(self, *events, failure=SEGFAULT, times=1):
        return [self._die(events, failure) for _ in range(times)]

    def _die(self, events, failure):
        for event in events:
            self.run.event(event, attempt=self.attempt, nodes=["node-a", "node-b"])
        self.attempt += bool(events)
        return self.policy.should_restart(failure)


@pytest.fixture
def starts(run, policy):
    return Starts(run, policy)


@pytest.mark.parametrize("phase", PHASES)
def test_so_many_in_the_same_phase_end_the_run_with_what_is_known(starts, run, capsys, phase):
    assert starts.die(*PHASES[phase], times=LIMIT) == [RETRY] * (LIMIT - 1) + [RAISE]
    (event,) = run.events("given_up")
    node = "unknown" if phase == "building of the model" else "node-a"
    assert (event["phase"], event["times"], event["rank"], event["node"]) == (phase, LIMIT, 0, node)
    assert event["cause"] == "the worker process died"
    said = capsys.readouterr().out
    assert f"20 times in a row the workers have died in the same phase ({phase})" in said
    assert f"rank 0 on node {node}: the worker process died" in said


def test_whatever_the_errors_look_like(starts):
    errors = [failed(error, step=None) for error in (OSError(5, "Input/output error"), TimeoutError("slow"), RESET)]
    decisions = [starts.die("attempt", failure=errors[n % 3])[0] for n in range(LIMIT)]
    assert decisions == [RETRY] * (LIMIT - 1) + [RAISE]


def test_processes_that_do_not_come_up_count_too(policy, run):
    dead = ControllerError(WorkerGroupStartupFailedError("a worker died"))
    assert decide(policy, *[dead] * LIMIT) == [RETRY] * (LIMIT - 1) + [RAISE]
    assert run.events("given_up")[0]["phase"] == "start of the processes"


def test_without_room_it_is_waited_for_ever(policy):
    assert decide(policy, *[ControllerError(WorkerGroupStartupTimeoutError(2))] * 3 * LIMIT) == [RETRY] * 3 * LIMIT


def test_a_finished_step_begins_the_count_anew(starts):
    for _ in range(3):
        assert starts.die("attempt", times=LIMIT - 1) == [RETRY] * (LIMIT - 1)
        assert starts.die("attempt", "restored", "training") == [RETRY]
    assert starts.die("attempt", "restored", "training", times=2 * LIMIT) == [RETRY] * 2 * LIMIT


def test_so_does_a_checkpoint(starts, tmp_path):
    assert starts.die("attempt", times=LIMIT - 1) == [RETRY] * (LIMIT - 1)
    save_box(tmp_path)
    assert starts.die("attempt", times=LIMIT) == [RETRY] * (LIMIT - 1) + [RAISE]


def test_and_another_phase(starts):
    assert starts.die("attempt", times=LIMIT - 1) == [RETRY] * (LIMIT - 1)
    assert starts.die("attempt", "started") == [RETRY]
    assert starts.die("attempt", times=LIMIT) == [RETRY] * (LIMIT - 1) + [RAISE]


def test_attempts_of_an_earlier_submission_are_not_those_that_die_now(run, policy):
    run.event("attempt", attempt=7)
    run.event("training", attempt=7)
    run.event("submitted")
    assert Starts(run, policy).die(times=LIMIT) == [RETRY] * (LIMIT - 1) + [RAISE]
    assert run.events("given_up")[0]["phase"] == "building of the model"


@pytest.mark.parametrize("away", [(Catalog, "last_committed"), (RunDir, "turning_points")], ids=["catalog", "ledger"])
def test_storage_that_is_away_is_no_death(starts, monkeypatch, away):
    def fail(self):
        raise OSError(5, "Input/output error")

    assert starts.die("attempt", times=LIMIT - 1) == [RETRY] * (LIMIT - 1)
    with monkeypatch.context() as patch:
        patch.setattr(*away, fail)
        assert starts.die(times=3 * LIMIT) == [RETRY] * 3 * LIMIT
    assert starts.die("attempt") == [RAISE]


def test_a_node_that_is_taken_away_is_none_either(starts):
    died = ActorDiedError()
    died._preempted = True
    taken = failed(died, RESET, step=None)
    assert starts.die("attempt", failure=taken, times=3 * LIMIT) == [RETRY] * 3 * LIMIT
