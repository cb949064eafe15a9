"""Hangs turned into deaths: a thread beside training ends a process that makes no progress, so that it is restarted.

What no launcher sees (a rank stuck in a collective whose peer is gone, a deadlock, a read that never returns) looks
like a long step from outside. How long is too long is learned from the run itself, phase by phase.
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
_TICK_S = 0.25
_ENOUGH = 3  # durations of a phase from which on it is known what is usual
_EARLY = 6  # times the floor, before that: the first steps compile, allocate and connect
_GRACE_S = 1.5  # a rank that waits for others lets them say first what is the matter
_LAST_RESORT_S = 10.0  # after the limit, should the interpreter itself be stuck
_WAITING = re.compile(r"/torch/distributed/")
_DEVICE = re.compile(r"/areal_ray/engine/|/torch/")  # innermost: it waits for kernels, among them collectives


@dataclass(frozen=True)
class Stuck:
    """What is known of a process that makes no progress.

    Args:
        phase: what it does.
        step: that it computes; None if it computes none.
        seconds: for how long.
        where: "file:line in function", the innermost frame of the user's code (else of any).
        waiting: whether it waits for other ranks, and so is not the cause.
        stacks: of all threads.
    """

    phase: str
    step: int | None
    seconds: float
    where: str
    waiting: bool
    stacks: str


class Watchdog:
    """Watches the thread that made it, from a thread that needs nothing of it.

    Args:
        limits: how long is too long.
        stuck: told before the process ends; may write files and take its time, up to a few seconds.
        end: ends the process.
    """

    def __init__(
        self, limits: WatchdogConfig, stuck: Callable[[Stuck], None], end: Callable[[int], object] = os._exit
    ) -> None:
        self._limits, self._stuck, self._end = limits, stuck, end
        self._watched = threading.get_ident()
        self._usual: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=20))
        self._phase, self._since = "start", time.monotonic()
        self._step: int | None = None
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
        """The watched thread is alive and begins this phase: step, evaluate, save, ...; in a step, which one."""
        now = time.monotonic()
        self._usual[self._phase].append(now - self._since)
        self._phase, self._since, self._step = phase, now, step
        self._arm()

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread.is_alive():
            self._thread.join()

    def limit(self) -> float:
        """Seconds without a beat after which this phase counts as stuck."""
        usual, limits = self._usual[self._phase], self._limits
        if self._phase not in _REGULAR or not usual:
            # A save that was cut off would begin again, and never be finished.
            return limits.patience_s * (_STORAGE_FACTOR if self._phase in _STORAGE else 1)
        if len(usual) < _ENOUGH:
            return min(limits.patience_s, max(_EARLY * limits.floor_s, limits.factor * max(usual)))
        return max(limits.floor_s, limits.factor * statistics.median(usual), 2 * max(usual))

    def _arm(self) -> None:
        # A thread in C: it ends the process even if no Python thread runs any more, with the stacks in its log.
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback_later(self.limit() + _LAST_RESORT_S, exit=True, file=sys.__stderr__)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(_TICK_S):
            now = time.monotonic()
            if now - last > 4 * _TICK_S:  # this process was stopped as a whole, and goes on now: no fault of training
                self._since += now - last
            last = now
            phase, since, step, limit = self._phase, self._since, self._step, self.limit()
            if now - since < limit:
                continue
            where, waiting = _place(sys._current_frames().get(self._watched))
            if waiting and now - since < limit + _GRACE_S:
                continue
            if since == self._since:
                self._stuck(Stuck(phase, step, now - since, where, waiting, _stacks()))
                self._end(EXIT_STATUS)
                return


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is ("file:line in function"), and whether it waits for other ranks there."""
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
