"""What one sees of a run while it trains: a line on the screen and a line in metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from areal_ray.run import RunDir
from areal_ray.train.cadence import Cadence


class Window:
    """Means over the steps of one logging window.

    Values stay on their device until `flush`, so that adding one never waits for the GPU. Part of a checkpoint: a run
    resumed in the middle of a window logs the same mean as one that was not disturbed.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor | float] = {}
        self._count = 0

    def add(self, values: dict[str, torch.Tensor | float]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + (value.double() if torch.is_tensor(value) else value)
        self._count += 1

    def flush(self) -> dict[str, float]:
        """The mean of every value since the last flush."""
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: float(total) for name, total in self._sums.items()}, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._count = dict(state["sums"]), state["count"]


class Tracker:
    """Collects every step, writes every so often. Only rank 0 has somewhere to write to.

    Args:
        cadence: when to write.
        run: where to; None on the other ranks.
        say: prints a line for the user.
        total_steps: for the display.
        tokens_per_step: of the global batch.
    """

    def __init__(
        self, cadence: Cadence, run: RunDir | None, say: Callable[[str], None], total_steps: int, tokens_per_step: int
    ) -> None:
        self._cadence, self._run, self._say = cadence, run, say
        self._total_steps, self._tokens_per_step = total_steps, tokens_per_step
        self._window = Window()
        self._skipped = 0  # steps of this window that were left out
        self._line: dict[str, Any] = {}
        self._began = self._seconds = 0.0
        self._steps_timed = 0

    def begin_step(self) -> None:
        """A step begins now. What lies between the steps (evaluation, saves) does not count as their time."""
        self._began = time.perf_counter()

    def end_step(self, step: int, epoch: int, stats: dict[str, Any]) -> None:
        """Take the results of a finished step: loss and grad_norm (scalars, may be on the device), lr, and skipped:
        whether it was left out; then its numbers are in no mean."""
        self._skipped += stats["skipped"]
        if not stats["skipped"]:
            self._window.add({"loss": stats["loss"], "grad_norm": stats["grad_norm"]})
        due = self._cadence.due(step, epoch) or step == self._total_steps
        means = self._window.flush() if due else {}  # waits for the device, so it belongs to the steps' time
        self._seconds += time.perf_counter() - self._began
        self._steps_timed += 1
        if not due:
            return
        self._cadence.fired(step, epoch)
        seconds = self._seconds / self._steps_timed
        rate = self._tokens_per_step / seconds
        skipped = {"skipped": self._skipped} if self._skipped else {}
        self._seconds, self._steps_timed, self._skipped = 0.0, 0, 0
        self._say_at(
            step,
            (f"loss {means['loss']:.4f}  grad norm {means['grad_norm']:.2f}  " if means else "")
            + f"lr {stats['lr']:.2e}  {rate:,.0f} tokens/s  {seconds:.3f} s/step"
            + "".join(f"  {n} skipped" for n in skipped.values()),
        )
        timing = {"tokens_per_s": round(rate, 1), "step_time_s": round(seconds, 4)}
        self._line |= {**means, "lr": stats["lr"], "epoch": epoch, **timing, **skipped}

    def evaluated(self, step: int, results: dict[str, float]) -> None:
        """Take the results of an evaluation after `step`."""
        self._say_at(step, "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in results.items()))
        self._line |= results

    def write(self, step: int) -> None:
        """Write the step's line, if there is anything to say of it."""
        line, self._line = self._line, {}
        if line and self._run is not None:
            try:
                self._run.log_metrics(step, line)
            except OSError as error:  # a line less is no reason to lose the step
                self._say(f"could not write the metrics of step {step}: {error}")

    def _say_at(self, step: int, text: str) -> None:
        self._say(f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  {text}")

    def state_dict(self) -> dict[str, Any]:
        return {"clock": self._cadence.state_dict(), "window": self._window.state_dict(), "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._cadence.load_state_dict(state["clock"])
        self._window.load_state_dict(state["window"])
        self._skipped = state.get("skipped", 0)  # absent from older checkpoints
