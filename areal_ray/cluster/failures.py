"""Root causes of failures: told in the ledger and on the screen as they happen, in a panel at the end."""

from __future__ import annotations

import pickle
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.exceptions import RayActorError

from areal_ray.cluster.bad_devices import BadDevice
from areal_ray.distributed import RankError
from areal_ray.distributed.flight_recorder import late_rank
from areal_ray.run import RunDir
from areal_ray.run.stack_frames import innermost
from areal_ray.run.versions import OtherVersions

# Errors of ranks that did nothing wrong, when another one is gone.
_COLLATERAL = re.compile(
    r"Connection (reset|closed|refused|timed out)|No route to host|(Network|Host) is unreachable"
    r"|Broken pipe|ncclRemoteError|ncclSystemError|Timed out waiting|timed out after"
    r"|Socket Timeout|failed to connect|Application timeout caused pair closure|BarrierResetError"
)
# Exceptions that machines, networks and storage cause, by the names of their classes.
_MACHINES = {"OSError", "TimeoutError", "DistError", "AcceleratorError", "RayError", "BadDevice"}
# But of these the code is to blame: wrong indices in a kernel, mostly.
_ASSERTS = re.compile("device-side assert|illegal memory access|illegal instruction")
_DIED = ("RayActorError", "ActorDiedError", "ActorUnavailableError")
_USERS = {
    *("FileNotFoundError", "FileExistsError", "PermissionError", "IsADirectoryError", "NotADirectoryError"),
    *("OutOfMemoryError", "BadGzipFile", "UnidentifiedImageError"),
}
_DEATH, _STUCK, _STOPPED = "the worker process died", "stuck", "stopped"  # kinds of causes that no exception names
_CAUSE = "The above exception was the direct cause of the following exception"  # as tracebacks say it


@dataclass(frozen=True)
class Cause:
    """The failure that the others follow from.

    Args:
        rank: of the worker; None if it was not a worker.
        kind, message: of the exception.
        where: "file:line in function" of the innermost frame of the user's code (else of any), "" if unknown.
        infrastructure: whether a machine, the network or storage is to blame, and not the code.
        node: of the worker, as it said itself or as Ray knows the address of a dead one; "" if unknown.
    """

    rank: int | None
    kind: str
    message: str
    where: str = ""
    infrastructure: bool = False
    node: str = ""

    @property
    def is_death(self) -> bool:
        """Whether a process was gone without a word: killed, crashed, or out of memory."""
        return self.kind == _DEATH


def root_cause(errors: dict[int, Exception]) -> Cause:
    """Choose among the exceptions of several ranks, by rank, the one to show."""

    def order(item: tuple[int, Exception]) -> tuple[bool, bool, bool, bool, int]:
        rank, error = item
        # A bad device, or other packages, explain all the rest; then an exception of one's own code explains most; then
        # a dead process; then errors of the survivors of either.
        return (
            not (isinstance(error, BadDevice) or (isinstance(error, OtherVersions) and error.here)),
            _is_collateral(error),
            isinstance(error, RankError),
            not hasattr(error, "__notes__"),
            rank,
        )

    rank, error = min(errors.items(), key=order)
    if isinstance(error, RankError):  # every rank has it; the one where it happened has its traceback, too
        rank = _of_one(error)[0] if isinstance(errors.get(_of_one(error)[0]), RankError) else rank
    cause = _describe(rank, errors[rank])
    return replace(cause, node=_node(errors.get(cause.rank))) if cause.rank is not None else cause


def _node(error: Exception | None) -> str:
    """Where it was raised, or where the worker died of which it tells."""
    found = re.search(r"^\s*ip: (\S+)", str(error), re.M)
    return str(getattr(error, "areal_ray", {}).get("node", found[1] if found else ""))


def _of_one(error: RankError) -> tuple[int, str, list[str]]:
    """Choose among failures of several ranks the first that the code is to blame for, else the first."""
    return min(error.failures, key=lambda failure: _is_infrastructure(set(failure[2])))


def _describe(rank: int | None, error: BaseException) -> Cause:
    kind = type(error).__name__
    if isinstance(error, RankError):
        rank, text, names = _of_one(error)
        kind, _, message = text.partition(": ")
        return Cause(rank, kind, message, _where(error), _is_infrastructure(set(names)) or _is_collateral(error))
    seen = getattr(error, "health_check_failure", error)  # wrapped by Ray Train when a health check fails
    if isinstance(seen, RayActorError) or kind in _DIED:
        who = _DEATH if rank is not None else "Ray Train's controller died"
        return Cause(rank, who, _why_died(str(error)), infrastructure=True)
    if kind == "WorkerHealthCheckTimeoutError":
        return Cause(rank, _STOPPED, "the process does not answer", infrastructure=True)
    bases = {each.__name__ for each in type(error).__mro__}
    message = " ".join(str(error).split())
    if "use_deterministic_algorithms" in message:  # which the user has not called
        message = f"engine.deterministic=true: {message}"
    machine = _is_infrastructure(bases) and not _ASSERTS.search(message)
    return Cause(rank, kind, message, _where(error), machine or _is_collateral(error))


def _is_collateral(error: BaseException) -> bool:
    return bool(_COLLATERAL.search(f"{type(error).__name__} {error}"))


def _is_infrastructure(names: set[str]) -> bool:
    """By the names of an exception's class and its bases."""
    return bool(names & _MACHINES) and not names & _USERS


def annotate(error: Exception, step: int | None) -> None:
    """Attach to an exception of a worker its traceback and step, for the controller.

    Args:
        step: that was being computed; None if none was (start, evaluation, a save).
    """
    # Ray hands exceptions on without their traceback, but with their attributes.
    error.add_note(traceback.format_exc())
    error.areal_ray = {"step": step, "time": time.time(), "node": socket.gethostname()}  # type: ignore[attr-defined]


def ensure_picklable(error: Exception, own_folders: Sequence[str] = ()) -> None:
    """Raise a RuntimeError in the place of an exception that would not reach the controller in one piece.

    A class whose constructor takes other arguments than its `args` cannot be unpickled, nor one of a module that the
    controller does not find; it would see a process that died without a word.

    Args:
        error: with its notes, see `annotate`.
        own_folders: with code of the user's own, where the controller does not look.
    """
    if not _is_own(type(error), own_folders):
        with suppress(Exception):  # whatever its class does
            pickle.loads(cloudpickle.dumps(error))  # noqa: S301  (its own)
            return
    plain = RuntimeError(f"{type(error).__name__}: {error}")
    plain.__notes__ = getattr(error, "__notes__", [])
    plain.areal_ray = error.areal_ray  # type: ignore[attr-defined]
    raise plain from None


def _is_own(kind: type[Exception], folders: Sequence[str]) -> bool:
    """Whether a class is of code in these folders, and neither of this package nor installed."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None or "site-packages" in file or kind.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return False
    return any(Path(file).is_relative_to(Path(folder).absolute()) for folder in folders)


def step_of(errors: dict[int, Exception], run: Callable[[], RunDir]) -> int | None:
    """The step at which workers failed, if any of them could still say, or its watchdog."""
    marks = [error.areal_ray["step"] for error in errors.values() if hasattr(error, "areal_ray")]
    steps = [step for step in marks if step is not None]
    if not steps:
        with suppress(OSError):  # then it is not known
            steps = [event["step"] for event in _stuck(run()).values() if event.get("step") is not None]
    return max(steps, default=None)


def _stuck(run: RunDir) -> dict[int, dict[str, Any]]:
    """Events of the watchdogs of the newest attempt, by rank."""
    events = run.turning_points()
    attempt = max((event["attempt"] for event in events if event["event"] == "attempt"), default=None)
    return {event["rank"]: event for event in events if event["event"] == "stuck" and event["attempt"] == attempt}


def detection_s(errors: dict[int, Exception]) -> float | None:
    """Seconds since the failure, by the first of the surviving workers that saw it; None if none did."""
    times = [error.areal_ray["time"] for error in errors.values() if hasattr(error, "areal_ray")]
    return round(max(0.0, time.time() - min(times)), 3) if times else None


def hung_cause(run: RunDir, errors: dict[int, Exception]) -> Cause | None:
    """The worker for which the others were ended by their watchdogs, if it was that; see watchdog.py.

    Args:
        run: its ledger has the events of the watchdogs.
        errors: of the ranks; those that could say something were no more stopped than those with a watchdog.
    """
    before = run.newest("failure")
    failed = before["time"] if before else 0.0
    latest = {rank: event for rank, event in _stuck(run).items() if event.get("time", 0.0) > failed}
    if not latest:
        return None
    for rank, event in sorted(latest.items()):
        if not event["waiting"]:
            text = f"no progress for {event.get('seconds', 0.0):.0f} s in phase {event.get('phase')}"
            return Cause(rank, _STUCK, text, event.get("where") or "", infrastructure=True)
    if late := late_rank({rank: event.get("collectives") or {} for rank, event in latest.items()}):
        return Cause(late[0], _STUCK, late[1], latest[late[0]].get("where") or "", infrastructure=True)
    alive = set(latest) | {rank for rank, error in errors.items() if hasattr(error, "areal_ray")}
    attempt = run.newest("attempt")
    world_size = attempt.get("world_size", 0) if attempt else 0
    silent = sorted(set(range(world_size)) - alive)
    if len(silent) == 1:
        return Cause(silent[0], _STOPPED, "no sign of life while the others waited for it", infrastructure=True)
    # With more of them it is not known which had no time to say anything, because they were ended with the first.
    return Cause(min(latest), _STUCK, "waited for others", latest[min(latest)].get("where") or "", infrastructure=True)


def _where(error: BaseException) -> str:
    # The note is the traceback, see worker.py.
    text = "".join(getattr(error, "__notes__", [])) or "".join(traceback.format_exception(error))
    if isinstance(error, RankError):  # raised again where the ranks agreed; the original comes before
        text = text.partition(_CAUSE)[0]
    return innermost(re.findall(r'File "([^"]+)", line (\d+), in (\S+)', text))


def _why_died(text: str) -> str:
    """The part of Ray's long message that is about this process."""
    if "running low on memory" in text:  # Ray's own killer, before the kernel's
        used = re.search(r"[\d.]+ ?[kMGT]i?B ?/ ?[\d.]+ ?[kMGT]i?B", text)
        return f"killed for lack of memory, by Ray{f': its node had used {used[0]}' if used else ''}"
    if "out of memory" in text.lower() or "OOM killed" in text:
        return "killed for lack of memory"
    if "creation task" in text:  # an exception in its constructor; the last line says which
        return text.strip().splitlines()[-1].strip()
    found = re.search(
        r"(exit code -?\d+|exit_code=-?\d+|signal \w+|Worker exit type: \w+|exited unexpectedly[^.]*)", text
    )
    return found[1] if found else "killed or crashed; nothing was left to say why"


def cause_of(error: BaseException, run: RunDir) -> Cause:
    """The root cause of a run that was given up."""
    workers: dict[int, Exception] = getattr(error, "worker_failures", {})
    if workers:
        cause = root_cause(workers)
        with suppress(OSError):  # the storage may be why it failed
            # Of processes that their watchdogs have ended the ledger says more than their exit status.
            seen: dict[str, Any] = next(
                (event for event in reversed(run.turning_points()) if event["event"] in ("failure", "submitted")), {}
            )
            if cause.kind == _DEATH and seen.get("cause") in (_STUCK, _STOPPED):
                return Cause(seen["rank"], seen["cause"], seen.get("error", ""), seen.get("where") or "", True)
        return cause
    return _describe(None, getattr(error, "controller_failure", error))
