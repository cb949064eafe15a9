"""Cadence: when something is due, over steps, epochs and seconds, or as often as it pays; apart from how it is done."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_LEAST_COSTS = 10  # an interval is at least so many times what a save costs: a tenth of the time goes into saves
_LEAST_S, _MOST_S = 5.0, 1800.0  # every checkpoint is a directory, and a line in several lists
_FIRST_S = 60.0  # before the cost of a save is known, if the run does not fail more often
_NODE_MTBF_S = 100 * 86400.0
_RECENT = 5  # saves whose median cost counts: the first one after a start is dearer
_CHANGE = 0.1  # less is none


class Cadence:
    """Due every `steps` steps, every `epochs` passes over the data, or every `seconds` seconds, whichever comes first.

    Args:
        steps, epochs, seconds: a period each; None switches that one off.
        agree: turns one rank's opinion into everyone's. Clocks of different machines differ, and a rank that saves
            while the others train is a deadlock, so the seconds are asked of one rank only.
        clock: a monotonic clock in seconds.

    `state_dict` holds the last firing, so that a resumed run fires at the steps at which the undisturbed one does.
    """

    def __init__(
        self,
        steps: int | None = None,
        epochs: int | None = None,
        seconds: float | None = None,
        agree: Callable[[bool], bool] = lambda opinion: opinion,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._epochs, self._seconds = steps, epochs, seconds
        self._agree, self._clock = agree, clock
        self._last_step = self._last_epoch = 0
        self._last_time = clock()

    def due(self, step: int, epoch: int) -> bool:
        """Whether the moment after `step` finished steps and `epoch` finished epochs is one to act at.

        Every rank must ask equally often. Asking changes nothing; call `fired` after acting.
        """
        due = bool(self._steps and step // self._steps > self._last_step // self._steps)
        due |= bool(self._epochs and epoch // self._epochs > self._last_epoch // self._epochs)
        if self._seconds is not None:
            due |= self._agree(self._clock() - self._last_time >= self._seconds)
        return due

    def fired(self, step: int, epoch: int) -> None:
        """Remember that it was acted upon.

        Steps and epochs are remembered as the period they lie in: an extra firing in between, at the end of a run that
        goes on later, leaves no trace in the state.
        """
        self._last_step = step - step % self._steps if self._steps else 0
        self._last_epoch = epoch - epoch % self._epochs if self._epochs else 0
        self._last_time = self._clock()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"last_step": self._last_step, "last_epoch": self._last_epoch}
        if self._seconds is not None:
            # Wall time differs from run to run: digests and diffs leave every `elapsed_s` out.
            state["elapsed_s"] = round(self._clock() - self._last_time, 3)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last_step, self._last_epoch = state["last_step"], state["last_epoch"]
        self._last_time = self._clock() - state.get("elapsed_s", 0.0)


class EverySteps(Cadence):
    """Due after every step that a number divides, whatever was done before: it has no state."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self._every = steps

    def due(self, step: int, epoch: int) -> bool:
        return step % self._every == 0

    def fired(self, step: int, epoch: int) -> None: ...


class AlsoEvery(Cadence):
    """Due when another cadence is, whose state it has, and after every step that a number divides.

    Args:
        other: asked every time, as its seconds are asked of one rank for all.
        steps: the number.
    """

    def __init__(self, other: Cadence, steps: int) -> None:
        super().__init__()
        self._other, self._every = other, steps

    def due(self, step: int, epoch: int) -> bool:
        return self._other.due(step, epoch) | (step % self._every == 0)

    def fired(self, step: int, epoch: int) -> None:
        self._other.fired(step, epoch)

    def state_dict(self) -> dict[str, Any]:
        return self._other.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._other.load_state_dict(state)


def save_interval(cost_s: float, mtbf_s: float) -> float:
    """Seconds from one save to the next with which a run loses least, to saves and to steps that are computed again.

    sqrt(2 * cost * MTBF): Young, "A First Order Approximation to the Optimum Checkpoint Interval", 1974; Daly, "A
    Higher Order Estimate of the Optimum Checkpoint Interval for Restart Dumps", 2006, whose further terms vanish where
    a save is short beside the MTBF. From 5 seconds to half an hour, but at least 10 times what a save costs.

    Args:
        cost_s: for which a save keeps training waiting; what is written beside it costs no steps.
        mtbf_s: mean time between failures of the run.
    """
    return max(_LEAST_COSTS * cost_s, _LEAST_S, min(_MOST_S, math.sqrt(2 * cost_s * mtbf_s)))


@dataclass(frozen=True)
class SaveHistory:
    """The past of a run, as far as it decides how often to save; an event of the ledger has it.

    Args:
        failures: seen so far.
        observed_s: seconds of training in which they came.
        cost_s: of a save; None: not known.
    """

    failures: int = 0
    observed_s: float = 0.0
    cost_s: float | None = None

    @classmethod
    def of(cls, tuned: Mapping[str, Any] | None, failure: Mapping[str, Any] | None) -> SaveHistory:
        """The history before an attempt, from the newest `save_interval` and the newest `failure` of the ledger.

        Every attempt tells its interval before it trains: since the newest there was one failure at most.
        """
        if tuned is None:
            return cls()
        failed = failure is not None and failure["time"] > tuned["time"]
        since = failure["time"] - tuned["time"] if failure is not None and failed else 0.0
        return cls(tuned["failures"] + failed, tuned["observed_s"] + since, tuned["cost_s"])

    def mtbf_s(self, nodes: int) -> float:
        """Mean time between failures: of those that were seen; before there is any, 100 days for each of the nodes.

        That is between what was published of large clusters (Llama 3, 2024: 419 interruptions of 2,000 nodes in 54
        days, one in 260 node days) and what smaller ones see.
        """
        return self.observed_s / self.failures if self.failures else _NODE_MTBF_S / nodes


class AutoCadence(Cadence):
    """Due as often as saves cost and failures come, see `save_interval`, and never before the last save has ended.

    Rank 0 decides; it hears how saves end, and tells whenever the interval changes by more than a tenth. With copies in
    memory most failures cost less than this reckons with; saves are then a little more frequent than they need be.

    Args:
        nodes: on which the ranks run.
        past: of the run.
        tell: writes fields of an event `save_interval`; called on rank 0 only.
        agree: as for Cadence.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        nodes: int,
        past: SaveHistory,
        tell: Callable[[dict[str, Any]], None],
        agree: Callable[[bool], bool] = lambda opinion: opinion,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(agree=agree, clock=clock)
        self._nodes, self._past, self._tell = nodes, past, tell
        self._began = clock()
        self._costs = deque([] if past.cost_s is None else [past.cost_s], maxlen=_RECENT)
        self._interval: float | None = None
        self._under_way = False

    def begin(self) -> None:
        """To be called on rank 0 before training: decide from the past alone."""
        self._tune()

    def due(self, step: int, epoch: int) -> bool:
        over = self._interval is not None and self._clock() - self._last_time >= self._interval
        return self._agree(over and not self._under_way)

    def fired(self, step: int, epoch: int) -> None:
        super().fired(step, epoch)
        self._under_way = True

    def ended(self, cost_s: float | None) -> None:
        """To be called on rank 0 when a save has ended, from any thread: what it cost, None if it has failed."""
        if cost_s is not None:
            self._costs.append(cost_s)
        self._tune()
        self._under_way = False

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "elapsed_s": round(self._clock() - self._last_time, 3)}

    def _tune(self) -> None:
        past, cost = self._past, statistics.median(self._costs) if self._costs else None
        observed = past.observed_s + self._clock() - self._began
        now = SaveHistory(past.failures, observed, cost)
        mtbf = now.mtbf_s(self._nodes)
        unknown = max(_LEAST_S, min(_FIRST_S, mtbf / 4))  # or a run that fails every minute would never save
        interval = unknown if cost is None else save_interval(cost, mtbf)
        if self._interval is None or abs(interval - self._interval) > _CHANGE * self._interval:
            self._interval = interval
            figures = {**asdict(now), "mtbf_s": mtbf, "interval_s": interval}
            self._tell({name: round(value, 4) if value is not None else None for name, value in figures.items()})
