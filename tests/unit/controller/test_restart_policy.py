"""Failures that restart the workers, and those that end the run."""

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, PreemptionError, PreemptionInfo
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from areal_ray.cluster.bad_devices import BadDevice, DeviceName
from areal_ray.cluster.requests import PlannedRestart, StoppedWhileWaiting
from areal_ray.controller.failure_policy import FailurePolicy
from areal_ray.distributed import RankError
from areal_ray.train.bad_steps import BadStepError
from areal_ray.train.recovery import TooManyFailedSaves
from tests.unit.checkpoint.boxes import save_box

from .controller_fakes import RAISE, RESET, RETRY, decide, failed

pytestmark = pytest.mark.unit


def test_leaving_on_request_is_no_failure(make):
    left = failed(PlannedRestart("resize"), RESET)
    assert decide(make(max_failures=0), *[left] * 5) == [RETRY] * 5


def test_failures_are_counted_up_to_their_limit(make):
    decisions = decide(make(max_failures=1), failed(ActorDiedError(), RESET), failed(ActorDiedError(), RESET))
    assert decisions == [RETRY, RAISE]


def test_nodes_that_are_taken_away_are_not_counted(make):
    announced = PreemptionError(PreemptionInfo(None, {"node": [1]}))
    died = ActorDiedError()
    died._preempted = True
    taken = failed(ActorDiedError(), RESET)
    taken.worker_failures[0] = WorkerHealthCheckFailedError("A worker health check failed.", died)  # as Ray Train does
    assert decide(make(max_failures=0), announced, taken, failed(ActorDiedError(), RESET)) == [RETRY, RETRY, RAISE]


@pytest.mark.parametrize(
    "error", [BadStepError("step 7"), TooManyFailedSaves([(0, "OSError: full", ["OSError"])])], ids=str
)
def test_what_says_that_the_run_is_to_stop_stops_it(make, error):
    assert decide(make(skip=True), failed(error, RESET)) == [RAISE]


def test_being_asked_to_stop_while_nothing_runs_stops_it(make):
    assert decide(make(), ControllerError(StoppedWhileWaiting("asked"))) == [RAISE]


class TestTheCodeFails:
    def test_the_same_error_at_the_same_step_twice_ends_the_run(self, make, capsys):
        decisions = decide(make(), failed(KeyError("no such column"), RESET), failed(KeyError("no such column"), RESET))
        assert decisions == [RETRY, RAISE]
        assert "the same error at step 6 twice, without a new checkpoint in between" in capsys.readouterr().out

    def test_twice_before_the_first_step_ends_it_too(self, make, capsys):
        assert decide(make(), *[failed(ValueError("mine"), step=None)] * 2) == [RETRY, RAISE]
        assert "the same error before the first step twice" in capsys.readouterr().out

    def test_on_whatever_rank(self, make):
        assert decide(make(), failed(ValueError("mine"), RESET), failed(RESET, ValueError("mine"))) == [RETRY, RAISE]

    def test_with_a_new_checkpoint_in_between_it_is_tried_again(self, make, tmp_path):
        restarts = make()
        for step in range(1, 5):
            assert decide(restarts, failed(ValueError("mine"))) == [RETRY]
            save_box(tmp_path, step=step)
        assert decide(restarts, *[failed(ValueError("mine"))] * 2) == [RETRY, RAISE]

    def test_at_another_step_it_is_tried_again(self, make):
        errors = [failed(ValueError("mine"), step=step) for step in (6, 7, 8, None)]
        assert decide(make(), *errors) == [RETRY] * 4

    def test_another_error_is_another(self, make):
        assert decide(make(), failed(ValueError("one")), failed(KeyError("one"))) == [RETRY] * 2

    def test_whatever_else_happened_in_between(self, make):
        code, death = failed(ValueError("mine"), RESET), failed(ActorDiedError(), RESET)
        assert decide(make(), code, death, code) == [RETRY, RETRY, RAISE]

    def test_a_module_that_the_workers_lack_is_tried_twice(self, make):
        lacking = ControllerError(ModuleNotFoundError("No module named 'mine'"))
        assert decide(make(), lacking, lacking) == [RETRY, RAISE]

    @pytest.mark.parametrize(
        "error", [FileNotFoundError(2, "No such file", "data.txt"), PermissionError(13, "no")], ids=str
    )
    def test_a_wrong_path_is_the_user_s_own(self, make, error):
        assert decide(make(), *[failed(error)] * 2) == [RETRY, RAISE]

    def test_work_of_all_ranks_fails_for_what_failed_on_one(self, make):
        together = RankError([(1, "FileNotFoundError: data.txt", ["FileNotFoundError", "OSError"])])
        assert decide(make(), *[failed(together, together)] * 2) == [RETRY, RAISE]


class TestAMachineFails:
    MANY = 12

    @pytest.mark.parametrize(
        "errors",
        [
            (ActorDiedError(), RESET),
            (ActorDiedError(), ActorDiedError()),
            (OSError(5, "Input/output error"), RESET),
            (OSError(28, "No space left on device"),),
            (ConnectionResetError("by the object store"),),
            (TimeoutError("slow"),),
            (RESET, RESET),
            (RankError([(1, "OSError: No space left on device", ["OSError"])]),),
        ],
        ids=lambda errors: type(errors[0]).__name__ + str(errors[0])[:20],
    )
    def test_a_run_goes_on_for_ever(self, make, errors):
        assert decide(make(), *[failed(*errors)] * self.MANY) == [RETRY] * self.MANY


class TestPoisonSteps:
    def test_the_second_time_the_step_is_left_out(self, make, run, capsys):
        restarts = make(skip=True)
        assert decide(restarts, failed(ValueError("mine"))) == [RETRY]
        assert run.events("poison_step") == []
        assert decide(restarts, failed(ValueError("mine"))) == [RETRY]
        (event,) = run.events("poison_step")
        assert (event["step"], event["cause"], event["error"]) == (6, "ValueError", "mine")
        assert "step 6 has failed 2 times, and is left out from now on" in capsys.readouterr().out
        assert decide(restarts, failed(ValueError("mine"))) == [RETRY]
        assert len(run.events("poison_step")) == 1

    def test_the_next_one_is_judged_anew(self, make, run):
        failures = [failed(ValueError("mine"), step=step) for step in (6, 6, 7, 7)]
        assert decide(make(skip=True), *failures) == [RETRY] * 4
        assert [event["step"] for event in run.events("poison_step")] == [6, 7]

    def test_deaths_at_one_step_take_a_third_time(self, make, run):
        restarts, death = make(skip=True), failed(ActorDiedError(), RESET)
        assert decide(restarts, death, death) == [RETRY] * 2
        assert run.events("poison_step") == []
        assert decide(restarts, death) == [RETRY]
        assert [(event["step"], event["cause"]) for event in run.events("poison_step")] == [
            (6, "the worker process died")
        ]

    def test_so_do_hangs(self, make, run):
        restarts, death = make(skip=True), failed(ActorDiedError(), ActorDiedError())
        for attempt in (1, 2, 3):
            run.event("attempt", attempt=attempt, world_size=2)
            run.event("stuck", attempt=attempt, rank=1, step=8, phase="step", waiting=False)
            assert decide(restarts, death) == [RETRY]
            assert [event["step"] for event in run.events("poison_step")] == [8] * (attempt == 3)

    def test_before_the_first_step_there_is_none_to_leave_out(self, make, run):
        assert decide(make(skip=True), *[failed(ValueError("mine"), step=None)] * 2) == [RETRY, RAISE]
        assert run.events("poison_step") == []


def test_ray_s_controller_is_told_the_decisions(make):
    policy = FailurePolicy(make(max_failures=1))
    decisions = [policy.make_decision(failed(ActorDiedError(), RESET)) for _ in range(2)]
    assert decisions == [FailureDecision.RETRY, FailureDecision.RAISE]


def test_a_bad_device_never_ends_the_run_and_counts_as_no_failure(make, run):
    bad = BadDevice(DeviceName("host-7", "ab12", 0, "GPU-1"), "uncorrected ECC errors")
    restarts = make(max_failures=1, skip=True)
    assert decide(restarts, *[failed(RESET, bad, step=6)] * 5, failed(ValueError("once"))) == [RETRY] * 6
    assert len(run.events("bad_device")) == 5
    assert [event["node"] for event in run.events("left_out")] == ["host-7"]
    assert run.events("poison_step") == []
