"""The training loop: batch, step, and what is due after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from areal_ray.data import GlobalBatches
from areal_ray.engine import Objective, TrainEngine
from areal_ray.train.bad_steps import BadStepPolicy
from areal_ray.train.cadence import Cadence
from areal_ray.train.early_stopping import Stopping
from areal_ray.train.evaluation import Evaluations
from areal_ray.train.recovery import PendingSave, RecoverHandler
from areal_ray.train.tracking import StepMetrics


class RunContext(Protocol):
    """The job around the loop. Every method is called by every rank, equally often."""

    def before_step(self, step: int) -> None:
        """Called before `step`, counted from 1, is computed."""
        ...

    def enter(self, phase: str) -> None:
        """Called at the beginning of a phase that is no step: evaluate, save, copy, restore, finish."""
        ...

    def leaving(self) -> bool:
        """Called after a step; whether the job is asked to save and leave here."""
        ...

    def check(self) -> None:
        """Called at the end; raises what went wrong in the background."""
        ...

    def saving(self, save: PendingSave, metrics: dict[str, float]) -> None:
        """Called when a save has begun; it is a checkpoint when its manifest is there."""
        ...


@dataclass
class Progress:
    """Progress of the run: finished steps, the samples that they took, and metrics of the model.

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
    """The objects of a training job, wired by the worker.

    Args:
        engine, batches, objective: what is trained, on what, and to what end.
        bad_steps, roll_back: which steps count; restores the last checkpoint, and says False if there is none.
        progress, metrics: where the run stands, and what is seen of it.
        evaluations, stopping: of the model, and when; whether the run is to end after one.
        recover, save, copy: how the run is saved, when to storage, and when only to memory.
        run: the job around the loop.
        last_step: where this invocation ends.
        total_steps: the length of the run.
    """

    engine: TrainEngine
    batches: GlobalBatches
    objective: Objective
    bad_steps: BadStepPolicy
    roll_back: Callable[[], bool]
    progress: Progress
    metrics: StepMetrics
    evaluations: Evaluations
    stopping: Stopping
    recover: RecoverHandler
    save: Cadence
    copy: Cadence
    run: RunContext
    last_step: int
    total_steps: int


def train(job: Job) -> None:
    """Train from where the progress stands to the last step, or until asked to leave; the end is always a checkpoint.

    A run that ends before its full length leaves no other trace than that checkpoint, so that going on later gives the
    same run as not having stopped.
    """
    progress, metrics = job.progress, job.metrics
    if progress.step == 0 and job.evaluations.due(0, 0):
        progress.metrics = job.evaluations.run(0, 0)
        metrics.evaluated(progress.metrics)
        job.stopping.see(0, progress.metrics)
        metrics.write(0)
    while progress.step < job.last_step and not job.stopping.reached:
        job.run.before_step(progress.step + 1)
        metrics.begin_step()
        lr = job.engine.lr
        _step(job, progress.step + 1)
        progress.step += 1
        progress.samples = job.batches.next_sample
        at = progress.step, job.batches.epoch
        evaluating = job.evaluations.due(*at)
        saving, copying = job.save.due(*at) or progress.step == job.last_step, job.copy.due(*at)
        if _went_back(job, now=evaluating or saving or copying or metrics.due(*at)):
            continue
        metrics.end_step(*at, lr)
        progress.metrics = {}
        if evaluating:
            progress.metrics = job.evaluations.run(*at)
            metrics.evaluated(progress.metrics)
            job.stopping.see(progress.step, progress.metrics)
        metrics.write(progress.step)
        ending = progress.step == job.last_step or job.stopping.reached
        leaving = job.run.leaving()
        if leaving and _went_back(job, now=True):
            continue  # asked again after the next step
        if saving or leaving or ending:
            job.save.fired(*at)
            job.run.enter("save")
            if metrics.loss is not None:
                progress.metrics["loss"] = metrics.loss
            save = job.recover.save(progress.step, progress.metrics, must=leaving or ending)
            if save is not None:
                job.run.saving(save, progress.metrics)
        elif copying:
            job.copy.fired(*at)
            job.run.enter("copy")
            job.recover.save_to_memory(progress.step)
        if leaving:
            break
    job.batches.close()
    job.run.enter("finish")
    job.recover.finish()
    job.run.check()


def _step(job: Job, step: int) -> None:
    """One step of the schedule, which changes the weights or is left out."""
    first, result = job.batches.next_sample, None
    if job.bad_steps.is_skipped(step):
        job.batches.skip()
    else:
        result = job.engine.forward_backward(next(job.batches), job.objective)
    update = job.bad_steps.judge(step, result, range(first, job.batches.next_sample))
    if update.wanted:
        job.recover.wait_for_copy()
        job.engine.optimizer_step(update.refused)
    else:
        job.engine.skip_step()
    job.engine.lr_scheduler_step()


def _went_back(job: Job, now: bool) -> bool:
    """Follow the verdicts on steps as they become known; whether the run has gone back to its last checkpoint.

    Args:
        now: that on the newest step too, as something is to be done with what it has left.
    """
    judged = job.bad_steps.settle(now)
    for each in judged:
        job.metrics.add(each.values if each.verdict == "take" else None)
    if all(each.verdict != "rollback" for each in judged):
        return False
    job.run.enter("restore")
    return job.roll_back()
