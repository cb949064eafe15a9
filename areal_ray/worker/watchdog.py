"""Ends a process that makes no progress, from a thread beside training, so that it is restarted.

A hang (a rank in a collective whose peer is gone, a deadlock, a read that never returns) looks like a long step from
outside, and no launcher sees it. How long is too long is learned from the run itself, phase by phase.
"""

from __future__ import annotations

import faulthandler
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from areal_ray.config import WatchdogConfig
from areal_ray.run.stack_frames import innermost

EXIT_STATUS = 86  # of a process that was ended because it was stuck
_REGULAR = ("step", "evaluate")  # take much the same time again and again; a save may wait for slow storage
_STORAGE, _STORAGE_FACTOR = ("save", "finish"), 4
_ENOUGH = 3  # durations of a phase that tell its usual one
_EARLY = 6  # times the floor, before that: the first steps compile, allocate and connect
_WAITING = re.compile(r"/torch/distributed/")
_DEVICE = re.compile(r"/areal_ray/engine/|/torch/")  # innermost: it waits for kernels, among them collectives


@dataclass(frozen=True)
class Stuck:
    """Report on a process that makes no progress.

    Args:
        phase: its phase, as told to `Watchdog.beat`.
        step: the step that it computes; None if it computes none.
        seconds: time since the last beat.
        where: "file:line in function", the innermost frame of the user's code (else of any).
        waiting: whether it waits for other ranks, and so is not the cause.
        stacks: stacks of all threads.
        attempt: of this process; None if it was not known yet.
    """

    phase: str
    step: int | None
    seconds: float
    where: str
    waiting: bool
    stacks: str
    attempt: int | None = None


class Watchdog:
    """Watches the thread that constructs it, from a thread of its own.

    Args:
        limits: how long is too long.
        stuck: called with the report before the process ends; may write files, and take a few seconds.
        end: ends the process, with its exit status.
        tick_s: seconds between two looks.
        grace_s: seconds beyond its limit for a rank that waits for others: the cause reports first.
        last_resort_s: seconds beyond its limit after which C code ends the process, should the interpreter hang.
        clock: seconds, monotonic.

    Attributes:
        attempt: of this process, for its report: by then another one may have begun elsewhere. None until it is known.
    """

    def __init__(
        self,
        limits: WatchdogConfig,
        stuck: Callable[[Stuck], None],
        end: Callable[[int], object] = os._exit,
        *,
        tick_s: float = 0.25,
        grace_s: float = 1.5,
        last_resort_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert limits.floor_s is not None  # Config fills it in
        self._limits, self._floor_s, self._stuck, self._end = limits, limits.floor_s, stuck, end
        self._tick_s, self._grace_s, self._last_resort_s, self._clock = tick_s, grace_s, last_resort_s, clock
        self._watched = threading.get_ident()
        self._usual: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=20))
        self._phase, self._since = "start", clock()
        self._step: int | None = None
        self.attempt: int | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._arm()
        self._thread.start()

    def beat(self, phase: str, step: int | None = None) -> None:
        """Tells that the watched thread is alive and begins a phase.

        Args:
            phase: step, evaluate, save, finish, ...
            step: the number of the step, where it is one.
        """
        now = self._clock()
        self._usual[self._phase].append(now - self._since)
        self._phase, self._since, self._step = phase, now, step
        self._arm()

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread.is_alive():
            self._thread.join()

    def limit(self) -> float:
        """Seconds without a beat after which the present phase counts as stuck."""
        usual, limits = self._usual[self._phase], self._limits
        if self._phase.startswith("connect"):
            return limits.connect_s
        if self._phase not in _REGULAR or not usual:
            # A save that was cut off would begin again, and never be finished.
            return limits.patience_s * (_STORAGE_FACTOR if self._phase in _STORAGE else 1)
        if len(usual) < _ENOUGH:
            return min(limits.patience_s, max(_EARLY * self._floor_s, limits.factor * max(usual)))
        return max(self._floor_s, limits.factor * statistics.median(usual), 2 * max(usual))

    def _arm(self) -> None:
        # A thread in C: it ends the process even if no Python thread runs any more, with the stacks in its log.
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback_later(self.limit() + self._last_resort_s, exit=True, file=sys.__stderr__)

    def _watch(self) -> None:
        last = self._clock()
        while not self._stopped.wait(self._tick_s):
            now = self._clock()
            if self.look(now, now - last):
                return
            last = now

    def look(self, now: float, passed: float) -> bool:
        """Looks at the watched thread once, and ends the process if it is stuck.

        Args:
            now: the clock's time.
            passed: seconds since the look before.

        Returns:
            Whether the process was ended.
        """
        if passed > 4 * self._tick_s:  # this process was stopped as a whole, and goes on now: no fault of training
            self._since += passed
        phase, since, step, limit = self._phase, self._since, self._step, self.limit()
        if now - since < limit:
            return False
        where, waiting = _place(sys._current_frames().get(self._watched))
        if waiting and now - since < limit + self._grace_s:
            return False
        if since != self._since:  # a beat at the last moment
            return False
        try:
            self._stuck(Stuck(phase, step, now - since, where, waiting, _stacks(), self.attempt))
        finally:  # whatever keeps it from being written down
            self._end(EXIT_STATUS)
        return True


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """A thread's place, "file:line in function", and whether it waits for other ranks there."""
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    waiting = any(_WAITING.search(name) for name, *_ in frames) or bool(frames and _DEVICE.search(frames[0][0]))
    return innermost(frames[::-1]) or "unknown", waiting


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read().decode()
