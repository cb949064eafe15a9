"""Decides which failures restart the workers and which end the run. Plain code, with Ray's public exceptions only.

Machines fail in every way and a run goes on; code that fails twice in the same place fails a third time. Ray's own
policy counts both alike, and ends a run for failures that a restart mends, such as a process group that did not come
up.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from areal_ray.checkpoint import Catalog
from areal_ray.cluster.bad_devices import BadNodes
from areal_ray.cluster.early_deaths import EarlyDeaths
from areal_ray.cluster.failures import Cause, root_cause, step_of
from areal_ray.cluster.requests import StoppedWhileWaiting, is_planned, taken_over
from areal_ray.cluster.restore_watch import RestoreWatch
from areal_ray.controller.worker_count import WorkerCount
from areal_ray.run import RunDir
from areal_ray.train.bad_steps import BadStepError
from areal_ray.train.recovery import TooManyFailedSaves

_FINAL = (BadStepError, TooManyFailedSaves)  # exceptions of a worker that say that the run is to stop
_NOT_STARTED = {"WorkerGroupStartupFailedError", "WorkerGroupStartupTimeoutError"}  # Ray Train's, by name
_DIED_WHILE_STARTING = {"WorkerGroupStartupFailedError"}
_TWICE = 2  # so often an error of the code at one step ends the run
_THRICE = 3  # so often a death of workers at one step counts as the step's own fault, if such steps may be skipped
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class _Failure:
    """Identity of a failure; two that are equal are the same thing happening again."""

    kind: str
    where: str
    step: int | None


class RestartPolicy:
    """Decides whether a failure restarts the workers.

    Args:
        count: told of workers that could not be placed, and when to wait.
        run: the run directory.
        bad_nodes: told of bad devices and of other packages. These count neither as failures nor as errors of the code:
            the run goes on elsewhere, or waits until it can.
        max_failures: failures of workers that are restarted; -1: no limit. Planned restarts, preempted nodes and
            failures of the controller do not count.
        skip_poison_steps: leave out a step that fails again and again instead of ending the run.
        say: prints a line for the user.
        max_controller_failures: in a row, without a new checkpoint, that are mended by starting again.
        rapid_s: failures that come sooner than this one after the other, without a checkpoint, are waited between.
        clock: seconds, of any beginning.
    """

    def __init__(
        self,
        count: WorkerCount,
        run: RunDir,
        bad_nodes: BadNodes,
        max_failures: int,
        skip_poison_steps: bool,
        say: Callable[[str], None],
        max_controller_failures: int = 10,
        rapid_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count, self._run, self._bad_nodes, self._say = count, run, bad_nodes, say
        self._max_failures, self._skip = max_failures, skip_poison_steps
        self._max_controller_failures, self._rapid_s, self._clock = max_controller_failures, rapid_s, clock
        self._early_deaths, self._restores = EarlyDeaths(run, say), RestoreWatch(run, say)
        self._seen: Counter[_Failure] = Counter()  # since the newest checkpoint
        self._last_controller_error = ""
        self._rapid_failures = self._controller_failures = self._worker_failures = 0
        self._checkpoint: str | None = None
        self._left_out: set[int] = set()
        self._at = float("-inf")

    @property
    def troubled(self) -> bool:
        """Whether failures come one right after the other, without a checkpoint in between."""
        return self._rapid_failures > 1  # one that comes right after another may be its echo

    def should_restart(self, failure: Any) -> bool:
        """Decide about a TrainingFailedError, and say why."""
        workers: dict[int, Exception] = getattr(failure, "worker_failures", {})
        error: Exception | None = getattr(failure, "controller_failure", None)
        if is_planned(workers):
            self._rapid_failures = 0  # they have saved
            return True
        if taken_over([*workers.values(), error]):
            return False
        if any(isinstance(each, _FINAL) for each in workers.values()) or isinstance(error, StoppedWhileWaiting):
            return False
        storage_answers = self._look_for_progress()
        bad_node = self._bad_nodes.record(workers.values())
        if workers and storage_answers:
            with suppress(OSError):  # storage that is away says nothing of a checkpoint
                self._restores.record(workers, bad_node or any(map(_is_preempted, workers.values())))
        if workers and not bad_node:
            if self._is_final(root_cause(workers), step_of(workers, lambda: self._run)):
                return False
        elif error is not None and _is_not_started(error):
            self._not_started(error)
        elif error is not None and not self._retry_controller_error(error):
            return False
        if storage_answers and not bad_node and self._is_early_death_too_many(workers, error):
            return False
        self._wait_if_rapid()
        if not workers or bad_node or any(map(_is_preempted, workers.values())):
            return True
        self._worker_failures += 1
        return self._max_failures == -1 or self._worker_failures <= self._max_failures

    def _look_for_progress(self) -> bool:
        """Whether the storage answers; else nothing new is known."""
        try:
            newest = Catalog(self._run.storage).last_committed()
        except OSError:
            return False
        if newest != self._checkpoint:
            self._checkpoint, self._rapid_failures, self._controller_failures = newest, 0, 0
            self._seen.clear()
            self._early_deaths.progressed()
        return True

    def _is_early_death_too_many(self, workers: dict[int, Exception], error: Exception | None) -> bool:
        """Count a death before the first step, unless a node was taken away, or there was no room."""
        if workers:
            died, cause = not any(map(_is_preempted, workers.values())), root_cause(workers)
        else:
            died = type(error).__name__ in _DIED_WHILE_STARTING
            cause = Cause(None, type(error).__name__, " ".join(str(error).split()))
        try:
            return died and self._early_deaths.is_enough(cause, started=bool(workers))
        except OSError:  # storage that is away is no death
            return False

    def _is_final(self, cause: Cause, step: int | None) -> bool:
        """Whether this is the code's own doing, and comes again whenever it is tried."""
        failure = _Failure(cause.kind, cause.where or cause.message, step)
        self._seen[failure] += 1
        times, enough = self._seen[failure], _THRICE if cause.infrastructure else _TWICE
        if times < enough:
            return False
        if self._skip and step is not None and step not in self._left_out:
            self._left_out.add(step)
            self._say(f"step {step} has failed {times} times, and is left out from now on: {cause.kind}")
            fields = {"step": step, "cause": cause.kind, "error": cause.message[:500]}
            self._run.note("poison_step", self._say, **fields)
            del self._seen[failure]
            return False
        if cause.infrastructure:
            return False
        at = "before the first step" if step is None else f"at step {step}"
        self._say(f"the same error {at} twice, without a new checkpoint in between: restarting does not mend it")
        return True

    def _not_started(self, error: Exception) -> None:
        """There was no room after all, or a worker died while it started."""
        placed = type(error).__name__ != "WorkerGroupStartupTimeoutError"
        if placed:
            self._say("a worker died while it started: starting them again")
        else:
            self._say(f"there was no room for {self._count.try_fewer()} workers after all: trying again")
        self._run.note("not_started", self._say, placed=placed, error=" ".join(str(error).split())[:500])

    def _retry_controller_error(self, error: Exception) -> bool:
        """Of the controller: its storage is full or away, a process group did not come up, or the like."""
        self._controller_failures += 1
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        # A module that the workers lack, mostly: it is missing the next time, too.
        same, self._last_controller_error = text == self._last_controller_error, text
        if self._controller_failures > self._max_controller_failures or (
            same and isinstance(getattr(error, "cause", error), ImportError)
        ):
            return False
        self._say(f"Ray's controller failed, starting the workers again: {text[:300]}")
        self._run.note("controller_trouble", self._say, error=text[:500])
        return True

    def _wait_if_rapid(self) -> None:
        now = self._clock()
        self._rapid_failures = self._rapid_failures + 1 if now - self._at < self._rapid_s else 0
        self._at = now
        if self.troubled:
            wait = min(_LONGEST_WAIT_S, 2.0 ** min(self._rapid_failures - 2, 10))
            self._at += wait
            self._say(f"{self._rapid_failures + 1} failures without a new checkpoint: starting again in {wait:.0f} s")
            self._count.hold_back(wait)


def _is_preempted(error: Exception) -> bool:
    """Whether a worker died because its node was taken away. Ray Train wraps the error that knows it in another."""
    return bool(getattr(getattr(error, "health_check_failure", error), "preempted", False))


def _is_not_started(error: Exception) -> bool:
    return any(each.__name__ in _NOT_STARTED for each in type(error).__mro__)
