"""Root causes of failed runs: the failure that the others follow from, and where in the user's code it was."""

import json
import pickle
import traceback
from gzip import BadGzipFile
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

from areal_ray.cluster.failures import Cause, annotate, cause_of, root_cause
from areal_ray.controller.failure_report import Reporter
from areal_ray.distributed import RankError
from areal_ray.driver.panel import show
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit

RESET = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:4411"


@pytest.fixture
def run(tmp_path):
    storage = LocalStorage(tmp_path / "mine")
    storage.make()
    return RunDir(storage)


def raising(error):
    raise error  # here


def from_worker(error):
    """The exception as the controller gets it: with the note that worker.main adds, without its traceback."""
    try:
        raising(error)
    except type(error) as caught:
        caught.add_note(traceback.format_exc())
        return pickle.loads(pickle.dumps(caught))  # noqa: S301


def line_of(text):
    return 1 + Path(__file__).read_text().splitlines().index(text)


@pytest.mark.parametrize(
    "collateral",
    [
        RuntimeError(RESET),
        RuntimeError("Connection reset by peer"),
        RuntimeError("[1] Application timeout caused pair closure"),
        RankError([(2, "RuntimeError: of a neighbour", ["RuntimeError"])]),
    ],
    ids=str,
)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_user_s_exception_is_chosen_whatever_its_rank(collateral, rank):
    errors = {other: from_worker(collateral) for other in (0, 1, 2)}
    errors[rank] = from_worker(KeyError("no such column"))
    cause = root_cause(errors)
    assert (cause.rank, cause.kind, cause.message) == (rank, "KeyError", "'no such column'")


def test_the_user_s_exception_is_chosen_over_a_died_actor():
    cause = root_cause({0: ActorDiedError(), 1: from_worker(ValueError("mine")), 2: from_worker(RuntimeError(RESET))})
    assert (cause.rank, cause.kind) == (1, "ValueError")


def test_a_died_actor_is_chosen_over_what_the_survivors_saw():
    cause = root_cause({0: from_worker(RuntimeError(RESET)), 1: ActorDiedError(), 2: from_worker(RuntimeError(RESET))})
    assert cause == Cause(
        1, "the worker process died", "killed or crashed; nothing was left to say why", infrastructure=True
    )


def test_of_several_like_causes_the_lowest_rank_is_chosen():
    cause = root_cause({rank: from_worker(ValueError(f"on {rank}")) for rank in (2, 1, 3)})
    assert (cause.rank, cause.message) == (1, "on 1")


def test_of_work_that_failed_together_the_rank_that_failed_is_chosen():
    failure = (2, "OSError: No space left on device", ["OSError", "Exception"])
    cause = root_cause({rank: from_worker(RankError([failure])) for rank in range(4)})
    assert cause.rank == 2
    assert "No space left on device" in cause.message


def test_of_work_that_failed_together_the_code_s_failure_and_its_line_are_chosen():
    failures = [
        (0, "OSError: No space left on device", ["OSError", "Exception"]),
        (1, "ValueError: mine", ["ValueError", "Exception"]),
    ]

    def agreed(rank):
        try:
            try:
                raising(ValueError("mine") if rank == 1 else OSError(28, "No space left on device"))
            except Exception as error:
                raise RankError(failures) from error
        except RankError as error:
            error.add_note(traceback.format_exc())
            return pickle.loads(pickle.dumps(error))  # noqa: S301

    cause = root_cause({rank: agreed(rank) for rank in (0, 1)})
    assert (cause.rank, cause.kind, cause.message) == (1, "ValueError", "mine")
    assert cause.where == f"{__file__}:{line_of('    raise error  # here')} in raising"
    assert not cause.infrastructure


def test_if_there_is_nothing_else_what_a_survivor_saw_is_shown():
    cause = root_cause({1: from_worker(RuntimeError(RESET))})
    assert (cause.rank, cause.kind, cause.message) == (1, "RuntimeError", RESET)


def test_where_is_the_line_of_the_user_s_code():
    cause = root_cause({0: from_worker(ValueError("mine"))})
    assert cause.where == f"{__file__}:{line_of('    raise error  # here')} in raising"


def test_where_is_the_user_s_line_also_if_a_library_raised():
    text = "{"
    try:
        json.loads(text)  # called
    except ValueError as error:
        error.add_note(traceback.format_exc())
        cause = root_cause({0: error})
    line = line_of("        json.loads(text)  # called")
    assert cause.where == f"{__file__}:{line} in test_where_is_the_user_s_line_also_if_a_library_raised"


def test_a_message_of_many_lines_is_told_in_one():
    assert root_cause({0: from_worker(ValueError("one\n  two\n\nthree"))}).message == "one two three"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Worker exit type: SYSTEM_ERROR Worker exit detail: ...", "Worker exit type: SYSTEM_ERROR"),
        ("the process had exit code 17.", "exit code 17"),
        ("Task was killed due to the node running low: OOM killed", "killed for lack of memory"),
        ("ran Out Of Memory", "killed for lack of memory"),
    ],
)
def test_of_a_died_process_it_is_told_how(text, message):
    class ActorDied(Exception):
        pass

    ActorDied.__name__ = "ActorDiedError"
    assert root_cause({3: ActorDied(text)}) == Cause(3, "the worker process died", message, infrastructure=True)


def test_the_cause_of_a_run_that_was_given_up_is_that_of_its_workers(run):
    errors = {0: from_worker(RuntimeError(RESET)), 1: from_worker(ValueError("mine"))}
    cause = cause_of(WorkerGroupError("long", errors), run)
    assert (cause.rank, cause.kind, cause.message) == (1, "ValueError", "mine")


def test_the_cause_of_a_failed_controller_has_no_rank(run):
    cause = cause_of(ControllerError(ValueError("no room")), run)
    assert (cause.rank, cause.kind, cause.message) == (None, "ValueError", "no room")


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


def test_a_process_that_answers_no_longer_is_a_machine_s_failure():
    cause = root_cause({0: WorkerHealthCheckTimeoutError("hanging for 60 s"), 1: from_worker(RuntimeError(RESET))})
    assert (cause.rank, cause.kind, cause.infrastructure) == (0, "stopped", True)


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


MACHINE = [OSError(28, "No space left"), ConnectionResetError(), TimeoutError(), RuntimeError(RESET), BrokenPipeError()]
CODE = [
    FileExistsError(17, "is there"),
    BadGzipFile("no gzip"),
    FileNotFoundError(2, "no"),
    PermissionError(13, "no"),
    ValueError("mine"),
    MemoryError(),
    KeyError("x"),
]


@pytest.mark.parametrize("error", MACHINE + CODE, ids=lambda error: type(error).__name__)
def test_it_is_known_whether_a_machine_is_to_blame_or_the_code(error):
    assert root_cause({0: from_worker(error)}).infrastructure is (error in MACHINE)


@pytest.mark.parametrize(
    ("names", "infrastructure"), [(["OSError"], True), (["FileNotFoundError", "OSError"], False), (["KeyError"], False)]
)
def test_of_work_that_failed_together_it_is_known_too(names, infrastructure):
    assert root_cause({0: from_worker(RankError([(1, "a text", names)]))}).infrastructure is infrastructure


def test_the_panel_tells_cause_place_node_and_ledger_on_lines_to_copy(run, capsys):
    run.event("attempt", attempt=1, nodes=["node-a", "node-b"])
    show(Cause(1, "ValueError", "mine", "/home/me/model.py:7 in forward"), run, "/tmp/ray/logs")
    out, err = capsys.readouterr()
    assert out == ""
    rows = dict(line.split(maxsplit=1) for line in err.splitlines()[1:-1])
    assert rows["cause"] == "ValueError: mine"
    assert rows["at"] == "/home/me/model.py:7 in forward"
    assert rows["worker"] == "rank 1 on node node-b"
    assert rows["ledger"] == run.ledger
    assert rows["logs"] == "/tmp/ray/logs (on that node)"


def test_the_panel_does_without_what_is_not_known(run, capsys):
    show(Cause(None, "ControllerError", "no room"), run, "/tmp/ray/logs")
    err = capsys.readouterr().err
    assert "ControllerError: no room" in err
    assert "\nat " not in err
    assert "\nworker" not in err
