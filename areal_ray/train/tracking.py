"""Metrics of steps, aggregated over a logging window and handed to the sinks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from areal_ray.train.cadence import Cadence
from areal_ray.train.sinks import MetricsSink
from areal_ray.train.worker_numbers import CountedTime, WorkerNumbers


class Window:
    """Means over the steps of one logging window.

    Part of a checkpoint: a run resumed in the middle of a window logs the same mean as one that was not disturbed.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def flush(self) -> dict[str, float]:
        """The mean of every value since the last flush."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._count = dict(state["sums"]), state["count"]


class StepMetrics:
    """Aggregates the metrics of steps, and hands them to the sinks every so often. On other ranks than 0 there are no
    numbers of all workers, and sinks are not rewound.

    Args:
        cadence: when to log.
        sinks: where to.
        total_steps: the last of them is always logged.
        samples_per_step, tokens_per_step: of the global batch.
        waited: seconds that this rank has waited for batches so far.
        of_data: what there is to say of the data so far.
        workers: numbers of all ranks; None: tokens_per_s counts padding, too.
        counted: where the time goes, on rank 0; None elsewhere.
        pulse: told of every step that has ended.
    """

    def __init__(
        self,
        cadence: Cadence,
        sinks: Sequence[MetricsSink],
        total_steps: int,
        samples_per_step: int,
        tokens_per_step: int,
        waited: Callable[[], float] = lambda: 0.0,
        of_data: Callable[[], Mapping[str, float]] = dict,
        workers: WorkerNumbers | None = None,
        counted: CountedTime | None = None,
        pulse: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._cadence, self._sinks = cadence, sinks
        self._total_steps = total_steps
        self._samples_per_step, self._tokens_per_step = samples_per_step, tokens_per_step
        self._window = Window()
        self.loss: float | None = None  # of the newest step; None: it was left out
        self._skipped = 0  # steps of this window that were left out
        self._line: dict[str, Any] = {}
        self._began = self._seconds = 0.0
        # Between steps: since the last one ended, and so far in this window; None: no step has ended yet.
        self._ended: float | None = None
        self._evaluating = self._between = 0.0
        self._waited, self._waited_before, self._of_data = waited, 0.0, of_data
        self._steps_timed = 0
        self._workers, self._counted, self._pulse = workers, counted, pulse

    def begin_step(self) -> None:
        """Begin to time a step. What lies between the steps (evaluation, saves) does not count as their time."""
        self._began = time.perf_counter()
        if self._ended is not None:
            self._between += self._began - self._ended

    def add(self, values: Mapping[str, float] | None) -> None:
        """Take the numbers of the next step in order; None: it was left out, and is in no mean."""
        self._skipped += values is None
        self.loss = None if values is None else values["loss"]
        if values is not None:
            self._window.add(values)

    def due(self, step: int, epoch: int) -> bool:
        """Whether there is to be a line after this step."""
        return self._cadence.due(step, epoch) or step == self._total_steps

    def end_step(self, step: int, epoch: int, lr: float) -> None:
        """End to time a step; if a line is due, the numbers of all steps so far must have been added.

        A collective then: rank 0 hears the other ranks' numbers.

        Args:
            step: counted from 1.
            epoch: passes over the data that are complete.
            lr: that the step had.
        """
        due = self.due(step, epoch)
        if due and self._workers is not None:
            self._workers.collect()  # rank 0 waits for the others here, as in any step
        self._ended = time.perf_counter()
        self._seconds += self._ended - self._began
        self._steps_timed += 1
        self._pulse(step)
        if not due:
            return
        means = self._window.flush()
        self._cadence.fired(step, epoch)
        seen = {"samples": step * self._samples_per_step, "tokens": step * self._tokens_per_step}
        skipped = {"skipped": self._skipped} if self._skipped else {}
        self._line |= {**means, "lr": lr, "epoch": epoch, **seen, **self._of_data(), **self._timing(step), **skipped}
        self._skipped = 0

    def _timing(self, step: int) -> dict[str, float]:
        """What the clock says of the window, which ends here: means over its steps, and the seconds that are left."""
        seconds = self._seconds / self._steps_timed
        waited = self._waited()
        parts = waited - self._waited_before, self._evaluating, self._between - self._evaluating
        data, evaluation, save = (part / self._steps_timed for part in parts)
        self._waited_before = waited
        speeds = {"tokens_per_s": round(self._tokens_per_step / seconds, 1)}
        if self._workers is not None:
            speeds = self._workers.speeds(self._seconds)
        share: dict[str, float] = {}
        if self._counted is not None:
            self._counted.add(self._seconds)
            share = self._counted.share()
        self._seconds, self._steps_timed, self._evaluating, self._between = 0.0, 0, 0.0, 0.0
        return {
            **speeds,
            "step_time_s": round(seconds, 4),
            "data_s": round(data, 4),
            "compute_s": round(max(0.0, seconds - data), 4),
            "evaluation_s": round(evaluation, 4),
            "save_s": round(save, 4),
            "left_s": round((self._total_steps - step) * (seconds + evaluation + save), 1),
            **share,
            "time": round(time.time(), 3),
        }

    def evaluated(self, results: dict[str, float]) -> None:
        """Take the results of an evaluation after the step."""
        if self._ended is not None:
            self._evaluating += time.perf_counter() - self._ended
        self._line |= results

    def write(self, step: int) -> None:
        """Hand the step's values to the sinks, if there are any."""
        line, self._line = self._line, {}
        for sink in self._sinks if line else ():
            sink.log(step, line)

    def rewind(self, step: int) -> None:
        """Have the sinks take back what is computed again: the steps after this one."""
        for sink in self._sinks:
            sink.rewind(step)
        if self._counted is not None:
            self._counted.rewind()

    def close(self) -> None:
        with ExitStack() as closing:  # all of them, though one raises
            for sink in reversed(self._sinks):
                closing.callback(sink.close)

    def state_dict(self) -> dict[str, Any]:
        return {"clock": self._cadence.state_dict(), "window": self._window.state_dict(), "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._cadence.load_state_dict(state["clock"])
        self._window.load_state_dict(state["window"])
        self._skipped = state.get("skipped", 0)  # absent from older checkpoints
