"""Evaluation on held-out data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from areal_ray.data import GlobalBatches
from areal_ray.engine import Objective, TrainEngine
from areal_ray.engine.scalars import Reading


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
        readings = deque[Reading]()
        batches = self._open()
        for i in range(self._count + 1):
            self._alive()
            if i < self._count:
                result = self._engine.evaluate(next(batches), self._objective)
                readings.append(Reading([result.weight, result.loss, *result.metrics.values()]))
                names = "loss", *result.metrics
            if i > 0:  # a batch is read when the next one is under way
                own, *values = readings.popleft().values()
                for name, value in zip(names, values, strict=True):
                    sums[name] = sums.get(name, 0.0) + value * own
                weight += own
        batches.close()
        return {f"held_out_{name}": total / weight for name, total in sums.items()}
