"""The algorithm: batch, step, and what is due after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from areal_ray.cadence import Cadence
from areal_ray.data import GlobalBatches
from areal_ray.engine import TrainEngine
from areal_ray.evaluation import Evaluator
from areal_ray.objectives import LossFn, LossWeightFn
from areal_ray.recover import RecoverHandler
from areal_ray.tracking import Tracker


class RunContext(Protocol):
    """What the loop needs of the job around it. Every method is called by every rank, equally often."""

    def before_step(self, step: int) -> None:
        """`step`, counted from 1, is about to be computed."""
        ...

    def saved(self, step: int, checkpoint: str, metrics: dict[str, float]) -> None:
        """The checkpoint of that name is committed."""
        ...


@dataclass
class Progress:
    """How far the run is: finished steps, and the samples that they took."""

    step: int = 0
    samples: int = 0
    loss: float = float("nan")

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "samples": self.samples, "loss": self.loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.samples, self.loss = state["step"], state["samples"], state["loss"]


def train(
    engine: TrainEngine,
    batches: GlobalBatches,
    loss_fn: LossFn,
    loss_weight_fn: LossWeightFn,
    progress: Progress,
    tracker: Tracker,
    evaluator: Evaluator | None,
    evaluate: Cadence,
    recover: RecoverHandler,
    save: Cadence,
    run: RunContext,
    last_step: int,
    total_steps: int,
) -> Progress:
    """Train from where `progress` stands to `last_step`; the end is always a checkpoint.

    The length of the run is `total_steps`; one that ends before it leaves no other trace than its checkpoint, so that
    going on later gives the same run as not having stopped.
    """
    if evaluator and progress.step == 0:
        tracker.evaluated(0, evaluator.run())
        tracker.write(0)
    while progress.step < last_step:
        run.before_step(progress.step + 1)
        tracker.begin_step()
        stats = engine.train_batch(next(batches), loss_fn, loss_weight_fn)
        progress.step += 1
        progress.samples = batches.next_sample
        at = progress.step, batches.epoch
        tracker.end_step(*at, stats)
        if evaluator and (evaluate.due(*at) or progress.step == total_steps):
            evaluate.fired(*at)
            tracker.evaluated(progress.step, evaluator.run())
        tracker.write(progress.step)
        if save.due(*at) or progress.step == last_step:
            save.fired(*at)
            progress.loss = float(stats["loss"])
            run.saved(progress.step, recover.dump(progress.step), {"loss": progress.loss})
    return progress
