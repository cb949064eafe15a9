"""Numbers that are seen beside a run's loss: of all its workers, and of its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from areal_ray.run import RunDir

Gather = Callable[[Sequence[float]], list[list[float]] | None]


class Given(Protocol):
    """What a rank has been given so far: positions of rows, and those of them that are no padding."""

    @property
    def positions(self) -> int: ...

    @property
    def tokens(self) -> int: ...


class WorkerNumbers:
    """Tokens and memory of all workers; rank 0 has them for each line of metrics.

    Args:
        gather: every rank's numbers on rank 0, None elsewhere; a collective, see `Ranks.gather_numbers`.
        parts: that a global batch is cut into; the ranks of a tensor group are given the same one.
        given: what this rank has been given.
        peak_bytes: the most memory that this rank has taken; must not wait for the device.
        device_s: seconds that a device would take for one position at its peak rate; None: not known.
    """

    def __init__(
        self, gather: Gather, parts: int, given: Given, peak_bytes: Callable[[], int], device_s: float | None = None
    ) -> None:
        self._gather, self._parts, self._given = gather, parts, given
        self._peak_bytes, self._device_s = peak_bytes, device_s
        self._before = 0.0, 0.0
        self._found: list[list[float]] | None = None

    def collect(self) -> None:
        """Bring the numbers of all ranks to rank 0. A collective: 24 bytes from each of them."""
        given = self._given
        self._found = self._gather([given.positions, given.tokens, self._peak_bytes()])

    def speeds(self, seconds: float) -> dict[str, float]:
        """The metrics `run.metric_names.SPEEDS` of the time between the last two collections; empty but on rank 0.

        Args:
            seconds: that went into steps.
        """
        if self._found is None:
            return {}
        size, peaks = len(self._found), [peak for _, _, peak in self._found]
        positions, tokens = (sum(row[i] for row in self._found) * self._parts / size for i in range(2))
        new_positions, new_tokens = positions - self._before[0], tokens - self._before[1]
        self._before = positions, tokens
        values = {
            "tokens_per_s": round(new_tokens / seconds, 1),
            "tokens_per_s_per_worker": round(new_tokens / seconds / size, 1),
            "memory_peak_bytes": int(max(peaks)),
            "memory_peak_rank": peaks.index(max(peaks)),
        }
        if new_tokens < new_positions:
            values["padding_share"] = round(1 - new_tokens / new_positions, 4)
        if self._device_s is not None:
            values["mfu"] = round(new_positions / seconds * self._device_s / size, 4)
        return values


class CountedTime:
    """Share of the time since the job was submitted that went into steps that stand; on rank 0.

    The lines of metrics are its memory: at a restart, and where a run goes back, it goes on from the last line that
    stands, so that steps which are computed again count once.

    Args:
        run: the run directory.
        clock: seconds since 1970.
    """

    def __init__(self, run: RunDir, clock: Callable[[], float] = time.time) -> None:
        self._run, self._clock = run, clock
        self._submitted: float | None = None
        self._seconds = 0.0

    def rewind(self) -> None:
        """Go back to the last line; to be called when those of steps that are computed again have been taken back."""
        submitted, lines = self._run.newest("submitted"), self._run.last_metrics()
        self._submitted = None if submitted is None else submitted["time"]
        shares = [line for line in lines if _number(line.get("counted_share")) and _number(line.get("time"))]
        self._seconds = 0.0
        if self._submitted is not None and shares:  # of an earlier submission nothing counts
            self._seconds = max(0.0, shares[-1]["time"] - self._submitted) * shares[-1]["counted_share"]

    def add(self, seconds: float) -> None:
        """Take seconds that went into steps."""
        self._seconds += seconds

    def share(self) -> dict[str, float]:
        """counted_share; empty where nobody knows when the job was submitted."""
        passed = 0.0 if self._submitted is None else self._clock() - self._submitted
        return {"counted_share": round(min(1.0, self._seconds / passed), 4)} if passed > 0 else {}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value
