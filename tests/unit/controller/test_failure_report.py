"""Failures of workers, written down as they are noticed: which rank, what, at which step, and who only waited."""

import pickle

import pytest
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError

from areal_ray.cluster.failures import annotate, cause_of
from areal_ray.controller.failure_report import Reporter
from tests.unit.cluster.test_failures import RESET, from_worker

pytestmark = pytest.mark.unit


def test_a_failure_is_written_down_when_it_is_noticed(run, tmp_path):
    errors = {1: from_worker(ValueError("mine")), 0: from_worker(RuntimeError(RESET))}
    Reporter(run).after_exception(None, errors)
    (event,) = run.events("failure")
    assert {key: event[key] for key in ("rank", "cause", "error", "ranks")} == {
        "rank": 1,
        "cause": "ValueError",
        "error": "mine",
        "ranks": [0, 1],
    }


HUNG = {"attempt": 2, "phase": "step", "step": 9, "seconds": 12.3, "where": "/home/me/model.py:7 in forward"}
DIED = {0: ActorDiedError(), 1: ActorDiedError(), 2: ActorDiedError()}


@pytest.fixture
def failure(run):
    """Notice that all three workers are dead; the failure that is written down."""

    def failure(*stuck):
        for attempt in (1, 2):
            run.event("attempt", attempt=attempt, world_size=3)
        for fields in stuck:
            run.event("stuck", **{**HUNG, **fields})
        Reporter(run).after_exception(None, DIED)
        return run.events("failure")[-1]

    return failure


def test_of_ranks_that_hung_the_one_that_waited_for_nobody_is_named(failure, capsys):
    event = failure({"rank": 0, "waiting": True}, {"rank": 2, "waiting": False}, {"rank": 1, "waiting": True})
    assert (event["rank"], event["cause"], event["where"]) == (2, "stuck", "/home/me/model.py:7 in forward")
    assert (event["error"], event["step"]) == ("no progress for 12 s in phase step", 9)
    assert "worker 2 failed: stuck: no progress for 12 s" in capsys.readouterr().out


def test_of_ranks_that_hung_the_one_that_said_nothing_is_named(failure):
    event = failure({"rank": 2, "waiting": True}, {"rank": 0, "waiting": True})
    assert (event["rank"], event["cause"]) == (1, "stopped")


def test_the_panel_of_a_run_that_was_given_up_says_who_hung_too(failure, run):
    failure({"rank": 2, "waiting": False})
    cause = cause_of(WorkerGroupError("long", DIED), run)
    assert (cause.rank, cause.kind, cause.where) == (2, "stuck", "/home/me/model.py:7 in forward")
    run.event("submitted")
    assert cause_of(WorkerGroupError("long", DIED), run).kind == "the worker process died"


def test_a_rank_that_could_still_say_what_it_saw_was_not_the_one_that_stopped(run):
    run.event("attempt", attempt=1, world_size=3)
    run.event("stuck", **{**HUNG, "attempt": 1}, rank=0, waiting=True)
    errors = {0: ActorDiedError(), 1: ActorDiedError(), 2: from_worker(RuntimeError(RESET))}
    annotate(errors[2], 7)
    Reporter(run).after_exception(None, errors)
    (event,) = run.events("failure")
    assert (event["rank"], event["cause"]) == (1, "stopped")


def test_what_cannot_be_written_down_takes_no_place_of_what_was_raised(run, capsys):
    class Odd(Exception):
        def __str__(self):
            raise ValueError("no text")

    Reporter(run).after_exception(None, {0: Odd()})
    assert "could not write down a failure: ValueError: no text" in capsys.readouterr().out


def test_of_ranks_that_wait_for_each_other_the_first_is_named(failure):
    event = failure(*({"rank": rank, "waiting": True} for rank in (2, 1, 0)))
    assert (event["rank"], event["error"]) == (0, "waited for others")


@pytest.mark.parametrize("stuck", [[], [{"rank": 2, "waiting": False, "attempt": 1}]], ids=["none", "earlier"])
def test_ranks_that_did_not_hang_are_not_said_to_have(failure, stuck):
    assert failure(*stuck)["cause"] == "the worker process died"


def test_the_step_of_a_failure_is_that_of_the_ranks_that_lived_to_tell_it(run):
    def marked(error, step):
        try:
            raise error
        except type(error) as caught:
            annotate(caught, step)
            return pickle.loads(pickle.dumps(caught))  # noqa: S301

    Reporter(run).after_exception(None, {0: marked(RuntimeError(RESET), 7), 1: ActorDiedError()})
    Reporter(run).after_exception(None, {0: marked(ValueError("mine"), None)})
    Reporter(run).after_exception(None, {1: ActorDiedError()})
    events = run.events("failure")
    assert [event["step"] for event in events] == [7, None, None]
    assert [event["detection_s"] is None for event in events] == [False, False, True]
