"""Evaluation on held-out data."""

from __future__ import annotations

from collections.abc import Callable

from areal_ray.data import GlobalBatches
from areal_ray.engine import Objective, TrainEngine


class Evaluator:
    """Evaluates on the same held-out batches every time, whatever the world size.

    Args:
        engine: what to evaluate.
        open_batches: a fresh iterator at the beginning of the held-out data.
        count: global batches per evaluation.
        objective: as for training.
        alive: called before every batch.
    """

    def __init__(
        self,
        engine: TrainEngine,
        open_batches: Callable[[], GlobalBatches],
        count: int,
        objective: Objective,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._open, self._count = engine, open_batches, count
        self._objective, self._alive = objective, alive

    def run(self) -> dict[str, float]:
        """held_out_loss, in nats per token for text, and the objective's other means, `held_out_` before their names.

        A collective.
        """
        sums, weight = dict[str, float](), 0.0
        batches = self._open()
        for _ in range(self._count):
            self._alive()
            result = self._engine.evaluate(next(batches), self._objective)
            for name, value in {"loss": result.loss, **result.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * float(result.weight)
            weight += float(result.weight)
        return {f"held_out_{name}": total / weight for name, total in sums.items()}
