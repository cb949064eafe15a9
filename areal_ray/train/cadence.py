"""Cadence: when something is due, over steps, epochs and seconds; apart from how it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


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
