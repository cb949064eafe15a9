"""Evaluation of the averages of the weights, beside the weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from areal_ray.train.evaluation import Evaluator


class AveragingEvaluator(Evaluator):
    """Evaluates the weights, and then their averages on the same batches: twice the time.

    Args:
        args: of `Evaluator`.
        averaged: a context in which the engine has the averages for its weights.
        wait_for_copy: waits for copies of the weights that are still being made, as these change now.
        kwargs: of `Evaluator`.
    """

    def __init__(
        self,
        *args: Any,
        averaged: Callable[[], AbstractContextManager[None]],
        wait_for_copy: Callable[[], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._averaged, self._wait_for_copy = averaged, wait_for_copy

    def run(self, *at: Any) -> dict[str, float]:
        """What `Evaluator.run` finds, and the same of the averages with `ema_` before the names. A collective."""
        found = super().run(*at)
        self._wait_for_copy()
        with self._averaged():
            averages = super().run(*at)
        return found | {f"ema_{name}": value for name, value in averages.items()}
