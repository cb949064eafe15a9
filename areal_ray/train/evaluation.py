"""Loss on text that the model does not train on."""

from __future__ import annotations

from collections.abc import Callable

from areal_ray.data import GlobalBatches
from areal_ray.engine import TrainEngine
from areal_ray.engine.objectives import LossFn, LossWeightFn


class Evaluator:
    """The same held-out batches every time, whatever the world size.

    Args:
        engine: what to evaluate.
        open_batches: a fresh iterator at the beginning of the held-out data.
        count: global batches per evaluation.
        loss_fn, loss_weight_fn: as for training.
        alive: called before every batch.
    """

    def __init__(
        self,
        engine: TrainEngine,
        open_batches: Callable[[], GlobalBatches],
        count: int,
        loss_fn: LossFn,
        loss_weight_fn: LossWeightFn,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._open, self._count, self._alive = engine, open_batches, count, alive
        self._loss_fn, self._loss_weight_fn = loss_fn, loss_weight_fn

    def run(self) -> dict[str, float]:
        """held_out_loss in nats per token. A collective."""
        loss = weight = 0.0
        batches = self._open()
        for _ in range(self._count):
            self._alive()
            result = self._engine.eval_batch(next(batches), self._loss_fn, self._loss_weight_fn)
            loss += float(result["loss"]) * float(result["weight"])
            weight += float(result["weight"])
        return {"held_out_loss": loss / weight}
