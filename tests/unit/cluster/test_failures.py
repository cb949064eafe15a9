"""Root causes of failed runs: the failure that the others follow from, and where in the user's code it was."""

import json
import pickle
import socket
import traceback
from gzip import BadGzipFile
from pathlib import Path

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

from areal_ray.cluster.failures import Cause, annotate, cause_of, hung_cause, root_cause
from areal_ray.distributed import RankError

pytestmark = pytest.mark.unit

RESET = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:4411"


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


def test_the_node_is_the_one_that_the_worker_itself_or_ray_names():
    mine = ValueError("mine")
    annotate(mine, None)
    assert root_cause({1: mine}).node == socket.gethostname()
    neighbours = RankError([(1, "ValueError: mine", ["ValueError"])])
    annotate(neighbours, None)
    neighbours.areal_ray["node"] = "another"
    assert root_cause({0: neighbours}).node == ""  # it is rank 1's that is asked for
    died = ActorDiedError(ActorDiedErrorContext(actor_id=bytes(16), node_ip_address="10.0.0.7"))
    assert root_cause({0: died}).node == "10.0.0.7"


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


def test_an_operation_that_is_not_deterministic_leads_to_the_key_of_the_config():
    text = "x does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'."
    assert root_cause({0: from_worker(RuntimeError(text))}).message == f"engine.deterministic=true: {text}"


def test_a_message_of_many_lines_is_told_in_one():
    assert root_cause({0: from_worker(ValueError("one\n  two\n\nthree"))}).message == "one two three"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Worker exit type: SYSTEM_ERROR Worker exit detail: ...", "Worker exit type: SYSTEM_ERROR"),
        ("the process had exit code 17.", "exit code 17"),
        ("Task was killed due to the node running low: OOM killed", "killed for lack of memory"),
        ("ran Out Of Memory", "killed for lack of memory"),
        (
            "1 worker(s) were killed due to the node running low on memory. Memory was 15.2GB / 16.0GB (0.95)",
            "killed for lack of memory, by Ray: its node had used 15.2GB / 16.0GB",
        ),
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


def test_a_process_that_answers_no_longer_is_a_machine_s_failure():
    cause = root_cause({0: WorkerHealthCheckTimeoutError("hanging for 60 s"), 1: from_worker(RuntimeError(RESET))})
    assert (cause.rank, cause.kind, cause.infrastructure) == (0, "stopped", True)


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


def test_of_ranks_that_all_wait_the_one_that_has_entered_fewer_collectives_is_the_cause(run):
    run.event("attempt", attempt=1, world_size=3)
    for rank, number in ((0, 12), (1, 9), (2, 12)):
        collectives = {"0:default_pg": [40, "all_reduce"], "1:mesh_shard": [number, "all_gather"]}
        where = {"phase": "step", "step": 7, "seconds": 60.0, "where": "model.py:1 in forward", "waiting": True}
        run.event("stuck", attempt=1, rank=rank, **where, collectives=collectives)
    cause = hung_cause(run, {})
    assert (cause.rank, cause.kind, cause.infrastructure) == (1, "stuck", True)
    assert cause.message == "has entered 9 collectives, and the others wait in all_gather 12 of group mesh_shard"
