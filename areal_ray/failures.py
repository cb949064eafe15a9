"""What went wrong, said once and clearly: in the ledger and on the screen as it happens, in a panel at the end."""

from __future__ import annotations

import re
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import TrainingFailedError, UserCallback

from areal_ray.console import say
from areal_ray.control import is_planned
from areal_ray.ranks import RankError
from areal_ray.rundir import RunDir
from areal_ray.storage import storage_at

# What the ranks that did nothing wrong report when another one is gone.
_COLLATERAL = re.compile(
    r"Connection (reset|closed|refused)|Broken pipe|ncclRemoteError|ncclSystemError|Timed out waiting|timed out after"
    r"|Socket Timeout|failed to connect|Application timeout caused pair closure|BarrierResetError"
)
_LIBRARY = re.compile(r"/(site|dist)-packages/|/lib/python3\.\d+/|<frozen ")


@dataclass(frozen=True)
class Cause:
    """The failure that the others follow from.

    Args:
        rank: of the worker; None if it was not a worker.
        kind, message: of the exception.
        where: "file:line in function" of the innermost frame of the user's code (else of any), "" if unknown.
    """

    rank: int | None
    kind: str
    message: str
    where: str = ""


def root_cause(errors: dict[int, Exception]) -> Cause:
    """Choose among the exceptions of several ranks, by rank, the one to show."""

    def order(item: tuple[int, Exception]) -> tuple[bool, bool, bool, int]:
        rank, error = item
        # An exception of one's own code explains most, then a dead process, then what the survivors saw of either.
        collateral = bool(_COLLATERAL.search(f"{type(error).__name__} {error}"))
        return collateral, isinstance(error, RankError), not hasattr(error, "__notes__"), rank

    rank, error = min(errors.items(), key=order)
    return _describe(rank, error)


def _describe(rank: int | None, error: BaseException) -> Cause:
    kind = type(error).__name__
    if isinstance(error, RankError):  # every rank has it; it says whose it is
        rank, text, _ = error.failures[0]
        kind, _, message = text.partition(": ")
        return Cause(rank, kind, message, _where(error))
    if kind in ("RayActorError", "ActorDiedError", "WorkerHealthCheckFailedError"):
        return Cause(rank, "the worker process died", _why_died(str(error)))
    return Cause(rank, kind, " ".join(str(error).split()), _where(error))


def _where(error: BaseException) -> str:
    # The note is the traceback, see worker.py.
    text = "".join(getattr(error, "__notes__", [])) or "".join(traceback.format_exception(error))
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', text)
    own = [frame for frame in frames if not _LIBRARY.search(frame[0])] or frames
    return f"{own[-1][0]}:{own[-1][1]} in {own[-1][2]}" if own else ""


def _why_died(text: str) -> str:
    """The part of Ray's long message that is about this process."""
    if "out of memory" in text.lower() or "OOM killed" in text:
        return "killed for lack of memory"
    found = re.search(
        r"(exit code -?\d+|exit_code=-?\d+|signal \w+|Worker exit type: \w+|exited unexpectedly[^.]*)", text
    )
    return found[1] if found else "killed or crashed; nothing was left to say why"


class Reporter(UserCallback):
    """Runs in Ray's controller: tells of every failure of the workers when it is noticed.

    Args:
        recipe: of the run directory's storage.
    """

    def __init__(self, recipe: dict[str, Any]) -> None:
        self._recipe = recipe

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if is_planned(worker_exceptions):
            return
        cause = root_cause(worker_exceptions)
        say(f"worker {cause.rank} failed: {cause.kind}: {cause.message[:200]}")
        run = RunDir(storage_at(**self._recipe))
        ranks = sorted(worker_exceptions)
        # An exception here would end the run, whatever its limit of failures.
        run.note("failure", say, rank=cause.rank, cause=cause.kind, error=cause.message[:500], ranks=ranks)


def cause_of(error: TrainingFailedError) -> Cause:
    """The root cause of a run that was given up."""
    workers: dict[int, Exception] = getattr(error, "worker_failures", {})
    if workers:
        return root_cause(workers)
    return _describe(None, getattr(error, "controller_failure", error))


def show(cause: Cause, run: RunDir) -> None:
    """One panel on stderr with what is needed to go on."""
    try:
        attempts = run.events("attempt")
    except OSError:  # the storage may be why it failed
        attempts = []
    nodes = attempts[-1].get("nodes", []) if attempts else []
    rows = [("cause", f"{cause.kind}: {cause.message[:1000]}")]
    if cause.where:
        rows.append(("at", cause.where))
    if cause.rank is not None:
        node = nodes[cause.rank] if cause.rank < len(nodes) else "unknown"
        rows.append(("worker", f"rank {cause.rank} on node {node}"))
    rows.append(("ledger", run.ledger))
    rows.append(("logs", f"{_log_directory()} (on that node)"))
    width = max(len(name) for name, _ in rows)
    # No frame around it and no wrapping: paths are there to be copied.
    print("── training failed " + "─" * 61, file=sys.stderr)
    for name, value in rows:
        print(f"{name:<{width}}  {value}", file=sys.stderr)
    print("─" * 80, file=sys.stderr, flush=True)


def _log_directory() -> str:
    node = ray._private.worker._global_node
    return "Ray's session directory" if node is None else str(node.get_logs_dir_path())
