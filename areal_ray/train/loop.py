"""The algorithm: batch, step, and what is due after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from areal_ray.data import GlobalBatches
from areal_ray.engine import TrainEngine
from areal_ray.engine.objectives import LossFn, LossWeightFn
from areal_ray.train.bad_steps import BadStepPolicy
from areal_ray.train.cadence import Cadence
from areal_ray.train.evaluation import Evaluator
from areal_ray.train.recovery import PendingSave, RecoverHandler
from areal_ray.train.tracking import Tracker


class RunContext(Protocol):
    """What the loop needs of the job around it. Every method is called by every rank, equally often."""

    def before_step(self, step: int) -> None:
        """`step`, counted from 1, is about to be computed."""
        ...

    def enter(self, phase: str) -> None:
        """What begins is no step and takes its time: evaluate, save, copy, restore, finish. For whoever watches."""
        ...

    def leaving(self) -> bool:
        """A step is finished; whether the job is asked to save and leave here."""
        ...

    def check(self) -> None:
        """The end is reached; raise what went wrong in the background."""
        ...

    def saving(self, dump: PendingSave, metrics: dict[str, float]) -> None:
        """A save has begun; it is a checkpoint when its manifest is there."""
        ...


@dataclass
class Progress:
    """How far the run is: finished steps, the samples that they took, and how good the model is.

    `metrics` has the loss of the last step that was saved (unless it was left out), and results if it was evaluated at
    that very step.
    """

    step: int = 0
    samples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "samples": self.samples, "metrics": self.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.samples, self.metrics = state["step"], state["samples"], dict(state["metrics"])


@dataclass
class Job:
    """Everything that training takes, wired by the worker.

    Args:
        engine, batches: what is trained, and on what.
        loss_fn, loss_weight_fn: the objective, as the engine takes it.
        guard, go_back: which steps count; restores the last checkpoint, and says False if there is none.
        progress, tracker: where the run stands, and what is seen of it.
        evaluator, evaluate: how held-out loss is computed (None: never), and when.
        recover, save: how the run is dumped, and when.
        remember: when it is only copied to memory.
        run: the job around the loop.
        last_step: where this invocation ends.
        total_steps: the length of the run.
    """

    engine: TrainEngine
    batches: GlobalBatches
    loss_fn: LossFn
    loss_weight_fn: LossWeightFn
    guard: BadStepPolicy
    go_back: Callable[[], bool]
    progress: Progress
    tracker: Tracker
    evaluator: Evaluator | None
    evaluate: Cadence
    recover: RecoverHandler
    save: Cadence
    remember: Cadence
    run: RunContext
    last_step: int
    total_steps: int


def train(job: Job) -> None:
    """Train from where the progress stands to the last step, or until asked to leave; the end is always a checkpoint.

    A run that ends before its full length leaves no other trace than that checkpoint, so that going on later gives the
    same run as not having stopped.
    """
    progress, tracker = job.progress, job.tracker
    if job.evaluator and progress.step == 0:
        progress.metrics = job.evaluator.run()
        tracker.evaluated(0, progress.metrics)
        tracker.write(0)
    while progress.step < job.last_step:
        job.run.before_step(progress.step + 1)
        tracker.begin_step()
        if job.guard.is_skipped(progress.step + 1):
            job.batches.skip()
            stats = job.engine.skip_batch()
        else:
            stats = job.engine.train_batch(next(job.batches), job.loss_fn, job.loss_weight_fn)
        if job.guard.after_step(progress.step + 1, stats):
            job.run.enter("restore")
            if job.go_back():
                continue
        progress.step += 1
        progress.samples = job.batches.next_sample
        at = progress.step, job.batches.epoch
        tracker.end_step(*at, stats)
        progress.metrics = {}
        if job.evaluator and (job.evaluate.due(*at) or progress.step == job.total_steps):
            job.evaluate.fired(*at)
            progress.metrics = job.evaluator.run()
            tracker.evaluated(progress.step, progress.metrics)
        tracker.write(progress.step)
        leaving = job.run.leaving()
        if job.save.due(*at) or leaving or progress.step == job.last_step:
            job.save.fired(*at)
            job.run.enter("save")
            if not stats["skipped"]:
                progress.metrics["loss"] = float(stats["loss"])  # waits for the device, as the save does anyway
            dump = job.recover.save(progress.step, progress.metrics, must=leaving or progress.step == job.last_step)
            if dump is not None:
                job.run.saving(dump, progress.metrics)
        elif job.remember.due(*at):
            job.remember.fired(*at)
            job.run.enter("copy")
            job.recover.save_to_memory(progress.step)
        if leaving:
            break
    job.run.enter("finish")
    job.recover.finish()
    job.run.check()
