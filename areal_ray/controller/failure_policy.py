"""What restarts the workers and what ends the run: Ray Train's failure policy, ours.

Machines fail in every way and a run goes on; code that fails twice in the same place fails a third time. Ray's own
policy counts both alike, and ends a run for what a restart mends, such as a process group that did not come up.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import (
    RETRYABLE_CONTROLLER_ERRORS,
    DefaultFailurePolicy,
)

from areal_ray.checkpoint import Catalog
from areal_ray.cluster.console import say
from areal_ray.cluster.failures import Cause, root_cause, step_of
from areal_ray.cluster.requests import is_planned
from areal_ray.controller.scaling_policy import ScalingPolicy, StoppedWhileWaiting
from areal_ray.run import RunDir
from areal_ray.train.bad_steps import BadStepError
from areal_ray.train.recovery import TooManyFailedSaves

_FINAL = (BadStepError, TooManyFailedSaves)  # exceptions of a worker that say that the run is to stop
_TROUBLES = 10  # of the controller in a row, without a new checkpoint, that are mended by starting again
_TWICE = 2  # so often an error of the code at one step ends the run
_THRICE = 3  # so often a death of workers at one step counts as the step's own fault, if such steps may be skipped
_QUICK_S = 60.0  # failures that come sooner than this one after the other, without a checkpoint, are waited between
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class _Failure:
    """What tells one failure from another; two that are equal are the same thing happening again."""

    kind: str
    where: str
    step: int | None


class FailurePolicy(DefaultFailurePolicy):
    """Decides whether a failure restarts the workers.

    Args:
        failure_config: limits of the number of failures, if any.
        count: told of workers that could not be placed, and when to wait.
        run: the run directory.
        skip_poison_steps: leave out a step that fails again and again instead of ending the run.
    """

    def __init__(
        self, failure_config: FailureConfig, count: ScalingPolicy, run: RunDir, skip_poison_steps: bool
    ) -> None:
        super().__init__(failure_config)
        self._count, self._run, self._skip = count, run, skip_poison_steps
        self._seen: Counter[_Failure] = Counter()  # since the newest checkpoint
        self._trouble = ""
        self._rapid_failures = self._controller_failures = 0
        self._checkpoint: str | None = None
        self._left_out: set[int] = set()
        self._at = float("-inf")

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        workers = getattr(training_failed_error, "worker_failures", {})
        trouble = getattr(training_failed_error, "controller_failure", None)
        if is_planned(workers):
            self._rapid_failures = 0  # they have saved
            return FailureDecision.RETRY
        if any(isinstance(error, _FINAL) for error in workers.values()) or isinstance(trouble, StoppedWhileWaiting):
            return FailureDecision.RAISE
        self._look_for_progress()
        if workers:
            if self._is_final(root_cause(workers), step_of(workers, lambda: self._run)):
                return FailureDecision.RAISE
        elif isinstance(trouble, RETRYABLE_CONTROLLER_ERRORS):
            self._not_started(trouble)
        elif trouble is not None and not self._retry_controller_error(trouble):
            return FailureDecision.RAISE
        self._wait_if_quick()
        if trouble is not None and not isinstance(trouble, RETRYABLE_CONTROLLER_ERRORS):
            return FailureDecision.RETRY
        return super().make_decision(training_failed_error)

    @property
    def troubled(self) -> bool:
        """Whether failures come one right after the other, without a checkpoint in between."""
        return self._rapid_failures > 1  # one that comes right after another may be its echo

    def _look_for_progress(self) -> None:
        try:
            newest = Catalog(self._run.storage).last_committed()
        except OSError:  # then nothing new is known
            return
        if newest != self._checkpoint:
            self._checkpoint, self._rapid_failures, self._controller_failures = newest, 0, 0
            self._seen.clear()

    def _is_final(self, cause: Cause, step: int | None) -> bool:
        """Whether this is the code's own doing, and comes again whenever it is tried."""
        failure = _Failure(cause.kind, cause.where or cause.message, step)
        self._seen[failure] += 1
        times, enough = self._seen[failure], _THRICE if cause.infrastructure else _TWICE
        if times < enough:
            return False
        if self._skip and step is not None and step not in self._left_out:
            self._left_out.add(step)
            say(f"step {step} has failed {times} times, and is left out from now on: {cause.kind}")
            fields = {"step": step, "cause": cause.kind, "error": cause.message[:500]}
            self._run.note("poison_step", say, **fields)
            del self._seen[failure]
            return False
        if cause.infrastructure:
            return False
        at = "before the first step" if step is None else f"at step {step}"
        say(f"the same error {at} twice, without a new checkpoint in between: restarting does not mend it")
        return True

    def _not_started(self, trouble: Exception) -> None:
        """There was no room after all, or a worker died while it started."""
        placed = not isinstance(trouble, WorkerGroupStartupTimeoutError)
        if placed:
            say("a worker died while it started: starting them again")
        else:
            say(f"there was no room for {self._count.not_placed()} workers after all: trying again")
        self._run.note("not_started", say, placed=placed, error=" ".join(str(trouble).split())[:500])

    def _retry_controller_error(self, trouble: Exception) -> bool:
        """Of the controller: its storage is full or away, a process group did not come up, or the like."""
        self._controller_failures += 1
        text = f"{type(trouble).__name__}: {' '.join(str(trouble).split())}"
        # What a worker could not even load, a module that it lacks, mostly.
        same, self._trouble = text == self._trouble, text
        if self._controller_failures > _TROUBLES or (
            same and isinstance(getattr(trouble, "cause", trouble), ImportError)
        ):
            return False
        say(f"Ray's controller failed, starting the workers again: {text[:300]}")
        self._run.note("controller_trouble", say, error=text[:500])
        return True

    def _wait_if_quick(self) -> None:
        now = time.monotonic()
        self._rapid_failures = self._rapid_failures + 1 if now - self._at < _QUICK_S else 0
        self._at = now
        if self.troubled:
            wait = min(_LONGEST_WAIT_S, 2.0 ** min(self._rapid_failures - 2, 10))
            self._at += wait
            say(f"{self._rapid_failures + 1} failures without a new checkpoint: starting again in {wait:.0f} s")
            self._count.hold(wait)
