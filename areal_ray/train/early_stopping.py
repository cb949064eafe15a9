"""Early stopping: the end of a run whose model does not get better any more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from areal_ray.config import EarlyStoppingConfig


class Stopping(Protocol):
    """Whether a run is to end before its last step."""

    @property
    def reached(self) -> bool: ...

    def see(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the results of an evaluation. A collective."""
        ...


class NeverStops:
    """A Stopping without a rule."""

    reached = False

    def see(self, step: int, metrics: Mapping[str, float]) -> None: ...


class EarlyStopping:
    """A Stopping when a metric has not improved for so many of its evaluations.

    Part of a checkpoint, three numbers: a run that died decides as one that did not. Whether it is reached follows from
    the configuration of now, so that a run goes on with more patience, or without a rule.

    Args:
        config: eval.early_stopping.
        agree: turns rank 0's opinion into everyone's: sums of floats may differ in the last bit.
        tell: called when it is reached, with fields of an event and a sentence; for rank 0.
    """

    def __init__(
        self,
        config: EarlyStoppingConfig,
        agree: Callable[[bool], bool] = lambda opinion: opinion,
        tell: Callable[[dict[str, Any], str], None] = lambda *_: None,
    ) -> None:
        self._config, self._agree, self._tell = config, agree, tell
        self._best: float | None = None
        self._best_step = self._without = 0  # the latter: evaluations since

    @property
    def reached(self) -> bool:
        return self._without >= self._config.patience

    def see(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the results of an evaluation; those without the metric do not count. A collective."""
        value = metrics.get(self._config.metric)
        if value is None:
            return
        if self._agree(self._is_better(value)):
            self._best, self._best_step, self._without = value, step, 0
            return
        self._without += 1
        if self.reached:
            best = "anything" if self._best is None else f"{self._best:.4f} of step {self._best_step}"
            what = f"{self._config.metric} has not improved on {best} in {self._without} evaluations"
            fields = {"step": step, "metric": self._config.metric, "best_step": self._best_step}
            self._tell(fields, f"early stopping after step {step}: {what}")

    def _is_better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self._best is None:
            return True
        gain = self._best - value if self._config.mode == "min" else value - self._best
        return gain > self._config.min_delta

    def state_dict(self) -> dict[str, Any]:
        best = {"best": self._best, "best_step": self._best_step, "without": self._without}
        return {"metric": self._config.metric, **best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was seen; of another metric, or without a rule, nothing was seen."""
        self._best, self._best_step, self._without = None, 0, 0
        if state.get("metric") == self._config.metric:
            self._best, self._best_step, self._without = state["best"], state["best_step"], state["without"]
