"""Places where metrics go: the screen and metrics.jsonl. Those of others are in trackers/."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from areal_ray.run import RunDir
from areal_ray.run.metric_names import HELD_OUT, RESERVED
from areal_ray.run.units import span_text

_SLOW_DATA = 0.1  # of a step's time: from which on waiting for data is shown


class MetricsSink(Protocol):
    """A place for metrics, on rank 0 only.

    A tracker of one's own (`trackers: [{name: package.module:Class, args: {}}]`) is one. It is made anew with every
    start of the workers, and called from a thread of its own, see `areal_ray.train.trackers.follower`.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step; each step comes once, in order, unless it is taken back."""
        ...

    def rewind(self, step: int) -> int | None:
        """Take back what was logged of steps after `step`: they are computed again. -1: of all steps.

        Returns:
            For a tracker that sends in the background, and could have lost something with its process: the last step
            that it really has. None: what it was given. It is given the steps after that next.
        """
        ...

    def close(self) -> None:
        """Finish; the run, or this start of its workers, has come to an end."""
        ...


class Console:
    """Lines on the screen.

    Args:
        say: prints a line for the user.
        total_steps: for the display.
    """

    def __init__(self, say: Callable[[str], None], total_steps: int) -> None:
        self._say, self._total_steps = say, total_steps

    def log(self, step: int, values: Mapping[str, float]) -> None:
        held_out = {name: value for name, value in values.items() if name.startswith(HELD_OUT)}
        if "lr" in values:
            own = {name: value for name, value in values.items() if name not in RESERVED and name not in held_out}
            parts = [f"loss {values['loss']:.4f}", f"grad norm {values['grad_norm']:.2f}"] if "loss" in values else []
            parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in own.items()]
            parts += [f"lr {values['lr']:.2e}", f"{values['tokens_per_s']:,.0f} tokens/s"]
            parts += [f"{values['mfu']:.1%} MFU"] if "mfu" in values else []
            parts += [f"{values['step_time_s']:.3f} s/step"]
            if values.get("data_s", 0.0) > _SLOW_DATA * values["step_time_s"]:
                parts += [f"{values['data_s']:.3f} of them waiting for data"]
            parts += [f"{span_text(values['left_s'])} left"] if values.get("left_s", 0.0) >= 60 else []
            parts += [f"{values['skipped']} skipped"] if "skipped" in values else []
            self._line(step, parts)
        if held_out:
            texts = [f"{name.replace('_', ' ').replace('/', ' ')} {value:.4f}" for name, value in held_out.items()]
            self._line(step, texts)

    def _line(self, step: int, parts: list[str]) -> None:
        self._say(f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  {'  '.join(parts)}")

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class Pulse:
    """Tells a terminal how far the run is, with each step, but no more often than one can read it.

    Args:
        tell: takes the news: step and steps; loss, tokens_per_s and left_s as soon as they are known.
        total_steps: of the run.
        every_s: seconds between two of them.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        tell: Callable[[Mapping[str, Any]], None],
        total_steps: int,
        every_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell, self._total_steps, self._every_s, self._clock = tell, total_steps, every_s, clock
        self._known: dict[str, float] = {}
        self._done_at, self._told_at = 0.0, -every_s  # when the run is thought to be done

    def beat(self, step: int) -> None:
        """Take a step that has ended."""
        now = self._clock()
        if now - self._told_at >= self._every_s:
            self._told_at = now
            left = {"left_s": max(0.0, self._done_at - now)} if self._known else {}
            self._tell({"step": step, "steps": self._total_steps, **self._known, **left})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if "left_s" in values:
            self._known = {name: values[name] for name in ("loss", "tokens_per_s") if name in values}
            self._done_at = self._clock() + values["left_s"]
            self._told_at = -self._every_s
            self.beat(step)

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """metrics.jsonl of the run directory.

    Args:
        run: the run directory.
        say: prints a line for the user.
    """

    def __init__(self, run: RunDir, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say

    def log(self, step: int, values: Mapping[str, float]) -> None:
        try:
            self._run.log_metrics(step, dict(values))
        except OSError as error:  # a line less is no reason to lose the step
            self._say(f"could not write the metrics of step {step}: {error}")

    def rewind(self, step: int) -> None:
        self._run.rewind_metrics(step)

    def close(self) -> None: ...
