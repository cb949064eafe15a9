"""Places where metrics go: the screen, metrics.jsonl, and trackers of one's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from areal_ray.config import TrackerConfig, plugin
from areal_ray.run import RunDir

_KNOWN = ("loss", "grad_norm", "lr", "epoch", "tokens_per_s", "step_time_s", "data_s", "skipped")

_SLOW_DATA = 0.1  # of a step's time: from which on waiting for data is shown


class MetricsSink(Protocol):
    """A place for metrics. Called on rank 0 only, from the training thread.

    Values are to be durable when `log` returns, as far as they must not be lost: a step before a copy in memory or a
    checkpoint is not computed again.

    A tracker of one's own (`trackers: [{name: package.module:Class, args: {}}]`) is one. It is made anew with every
    start of the workers.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step; each step comes once, in order, unless it is taken back."""
        ...

    def rewind(self, step: int) -> None:
        """Take back what was logged of steps after `step`: they are computed again. -1: of all steps."""
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
        held_out = {name: value for name, value in values.items() if name.startswith("held_out_")}
        if "lr" in values:
            own = {name: value for name, value in values.items() if name not in _KNOWN and name not in held_out}
            parts = [f"loss {values['loss']:.4f}", f"grad norm {values['grad_norm']:.2f}"] if "loss" in values else []
            parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in own.items()]
            parts += [f"lr {values['lr']:.2e}", f"{values['tokens_per_s']:,.0f} tokens/s"]
            parts += [f"{values['step_time_s']:.3f} s/step"]
            if values.get("data_s", 0.0) > _SLOW_DATA * values["step_time_s"]:
                parts += [f"{values['data_s']:.3f} of them waiting for data"]
            parts += [f"{values['skipped']} skipped"] if "skipped" in values else []
            self._line(step, parts)
        if held_out:
            self._line(step, [f"{name.replace('_', ' ')} {value:.4f}" for name, value in held_out.items()])

    def _line(self, step: int, parts: list[str]) -> None:
        self._say(f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  {'  '.join(parts)}")

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


class Tracker:
    """A user's sink, of which no failure reaches training: it is said once, and the tracker is left out from then on.

    Args:
        name: for that line.
        make: makes the user's.
        say: prints a line for the user.
        close_s: longest wait for its end, in seconds.
    """

    def __init__(
        self, name: str, make: Callable[[], MetricsSink], say: Callable[[str], None], close_s: float = 10.0
    ) -> None:
        self._name, self._say, self._close_s = name, say, close_s
        self._sink: MetricsSink | None = None
        try:
            self._sink = make()
        except Exception as error:  # noqa: BLE001  (as below)
            self._leave_out(error)

    def _try(self, call: Callable[[MetricsSink], None]) -> None:
        if self._sink is None:
            return
        try:
            call(self._sink)
        except Exception as error:  # noqa: BLE001  (the user's code; training is worth more than its curve)
            self._leave_out(error)

    def _leave_out(self, error: Exception) -> None:
        self._sink = None
        text = " ".join(str(error).split())[:300]
        self._say(f"the tracker {self._name} failed, and is left out from now on: {type(error).__name__}: {text}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda sink: sink.log(step, values))

    def rewind(self, step: int) -> None:
        self._try(lambda sink: sink.rewind(step))

    def close(self) -> None:
        """Close it, in a thread: one that waits for the network must not keep a failure from being noticed."""
        thread = threading.Thread(target=self._try, args=(lambda sink: sink.close(),), daemon=True)
        thread.start()
        thread.join(self._close_s)
        if thread.is_alive():
            self._say(f"the tracker {self._name} has not closed in {self._close_s:.0f} s")


def build_tracker(config: TrackerConfig, key: str, say: Callable[[str], None]) -> Tracker:
    """The tracker that one entry of `trackers` names.

    Raises:
        ConfigError: if there is no such thing.
    """
    make = plugin.factory(config.name, f"{key}.name", {})
    return Tracker(config.name, lambda: make(**config.args), say)
