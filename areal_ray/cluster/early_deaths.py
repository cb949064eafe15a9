"""Deaths of workers before their first step: so many in the same phase that nothing but a person will mend it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from areal_ray.cluster.failures import Cause
from areal_ray.run import RunDir

_LIMIT = 20  # at a minute's wait between the later ones, a quarter of an hour at least
START, BUILD, RESTORE, FIRST_STEP = "start of the processes", "building of the model", "restore", "first step"


class EarlyDeaths:
    """Counts the starts of the workers, one after the other, that end in the same phase before a step is finished.

    A machine or a network that is unwell looks no different from a library that crashes at every start. The one is
    better some starts later; the other is not.

    Args:
        run: the run directory, whose ledger says how far a start came.
        say: prints a line for the user.
        limit: starts that end the run.
    """

    def __init__(self, run: RunDir, say: Callable[[str], None], limit: int = _LIMIT) -> None:
        self._run, self._say, self._limit = run, say, limit
        self._phase, self._times = "", 0
        self._attempt = 0  # the newest that is known to have ended

    def progressed(self) -> None:
        """Begin to count anew: there is a new checkpoint."""
        self._times = 0

    def is_enough(self, cause: Cause, started: bool) -> bool:
        """Count a death; whether it is one too many, and then say and write down what is known.

        Args:
            cause: of the death.
            started: whether the processes had come up.

        Raises:
            OSError: if the ledger cannot be read: storage that is away is no death, and nothing is counted.
        """
        events = self._run.turning_points()
        attempt = _newest_of_submission(events)
        number = attempt["attempt"] if attempt else 0
        if number <= self._attempt:
            attempt = None  # this start has not come so far that it had one
        self._attempt = max(self._attempt, number)
        phase = START if not started else BUILD if attempt is None else _phase(events, attempt)
        self._times = self._times + 1 if phase == self._phase else 1
        self._phase = phase
        if phase == "" or self._times < self._limit:
            return False
        nodes = attempt["nodes"] if attempt and "nodes" in attempt else []
        node = nodes[cause.rank] if cause.rank is not None and cause.rank < len(nodes) else "unknown"
        last = f"rank {cause.rank} on node {node}: {cause.kind}: {cause.message[:200]}"
        self._say(
            f"{self._times} times in a row the workers have died in the same phase ({phase}), before any step was "
            f"finished: not starting them again; the last time {last}"
        )
        about = {"rank": cause.rank, "node": node, "cause": cause.kind, "error": cause.message[:500]}
        self._run.note("given_up", self._say, phase=phase, times=self._times, **about, where=cause.where)
        return True


def _newest_of_submission(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest attempt since the run was submitted."""
    for event in reversed(events):
        if event["event"] == "attempt":
            return event
        if event["event"] == "submitted":
            return None
    return None


def _phase(events: Sequence[dict[str, Any]], attempt: dict[str, Any]) -> str:
    """How far an attempt came; "" if it finished a step."""
    of = {event["event"] for event in events if event.get("attempt") == attempt["attempt"]}
    if "training" in of:
        return ""
    return FIRST_STEP if of & {"restored", "started"} else RESTORE
