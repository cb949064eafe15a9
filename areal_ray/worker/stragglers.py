"""Detects slow ranks: compares every rank's own time, without the time that it waits for others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from areal_ray.distributed import Ranks

_FACTOR = 2.0  # times the median of the others, from which on a rank is slow
_SHARE = 0.1  # of a step's time that a slow rank must cost
_WINDOWS = 2  # slow comparisons in a row before a rank is reported


class StragglerDetector:
    """Measures forward passes of the sharded units and the making of batches, and compares the ranks now and then.

    In a synchronous step all ranks take the same time, the slowest one's. What tells them apart is the time between a
    unit's parameters being there and its output: it has no collective in it.

    Args:
        units: modules that are gathered and computed as one; FSDP's hooks must have been set before.
        making: returns the seconds that this rank has spent on making batches so far.
        device: device of the computation; on CUDA its own clock is read.
        ranks: all ranks.
        every: steps between two comparisons.
        slow: called on rank 0 for a slow rank: its number, its seconds per step, the median of the others.
        clock: seconds, monotonic; for a step's time, and on the CPU for that of the units.
    """

    def __init__(
        self,
        units: Sequence[nn.Module],
        making: Callable[[], float],
        device: torch.device,
        ranks: Ranks,
        every: int,
        slow: Callable[[int, float, float], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._making, self._cuda, self._clock = making, device.type == "cuda", clock
        self._ranks, self._every, self._slow = ranks, every, slow
        self._seconds = 0.0
        self._open: dict[nn.Module, Any] = {}
        self._pairs: list[tuple[Any, Any]] = []
        self._steps, self._made, self._began = 0, 0.0, clock()
        self._in_a_row: dict[int, int] = {}
        for unit in units:
            unit.register_forward_pre_hook(self._enter)
            unit.register_forward_hook(self._leave, prepend=True)

    def _now(self) -> Any:
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._open[module] = self._now()

    def _leave(self, module: nn.Module, *_: Any) -> None:
        began, ended = self._open.pop(module), self._now()
        if self._cuda:
            self._pairs.append((began, ended))
        else:
            self._seconds += ended - began

    def after_step(self) -> None:
        """Counts a finished step; every `every` steps compares the ranks, a collective."""
        self._steps += 1
        if self._steps < self._every:
            return
        if self._cuda:
            # What the device has not come to yet counts with the next comparison: asking for it now would wait.
            pairs, self._pairs = self._pairs, []
            for began, ended in pairs:
                if ended.query():
                    self._seconds += began.elapsed_time(ended) / 1e3
                else:
                    self._pairs.append((began, ended))
        made, now = self._making(), self._clock()
        own = (self._seconds + made - self._made) / self._steps
        wall = (now - self._began) / self._steps
        self._seconds, self._made, self._steps, self._began = 0.0, made, 0, now
        everybody = self._ranks.gather_to_rank_zero(own)
        if everybody is not None and len(everybody) > 1:
            self._compare(everybody, wall)

    def _compare(self, own: list[float], wall: float) -> None:
        for rank, seconds in enumerate(own):
            usual = statistics.median(own[:rank] + own[rank + 1 :])
            if seconds < _FACTOR * usual or seconds - usual < _SHARE * wall:
                self._in_a_row.pop(rank, None)
                continue
            self._in_a_row[rank] = self._in_a_row.get(rank, 0) + 1
            if self._in_a_row[rank] == _WINDOWS:
                self._slow(rank, seconds, usual)
