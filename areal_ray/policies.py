"""How many workers there are, what restarts them, and how they are asked to leave: Ray Train's policies, ours.

Ray's own count nodes that have died, tear workers down without notice, and wait without a word; its interfaces for
policies are internal, and this is the one module that depends on them.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import ray
from ray.train import FailureConfig, Result, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import (
    RETRYABLE_CONTROLLER_ERRORS,
    DefaultFailurePolicy,
)
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.util import ObjectRefWrapper

from areal_ray.console import say
from areal_ray.control import Control, is_planned
from areal_ray.guard import BadStepError
from areal_ray.rundir import RunDir
from areal_ray.storage import storage_at

_LOOK_S = 5.0  # between two looks for more machines
_REMIND_S = 30.0  # between two lines about machines that are missing
_PAUSE_S = 0.5  # between two looks while nothing runs
_REFUSED_S = 300.0  # for so long fewer workers are tried, after some could not be started
_TROUBLES = 10  # of the controller with its storage, in one submission, before that ends the run
_AWAY = (ray.exceptions.RayError, ConnectionError)  # what calls to the head node raise while it is away


class StoppedWhileWaiting(RuntimeError):
    """The job was asked to stop when no worker ran."""


class WorkerCount(ElasticScalingPolicy):
    """As many workers as the live nodes have room for, in a number that mesh and global batch can be shared by.

    Args:
        scaling_config: with resources per worker.
        sizes: the numbers that can be used, ascending.
        control: to ask running workers to make room for more.
        recipe: of the run directory's storage, for the ledger.
    """

    def __init__(
        self, scaling_config: ScalingConfig, sizes: Sequence[int], control: Control, recipe: dict[str, Any]
    ) -> None:
        super().__init__(scaling_config)
        self._sizes, self._control, self._recipe = list(sizes), control, recipe
        self._reminded = self._looked = self._refused = float("-inf")
        self._asked = self._seen = self._tried = 0

    def _get_num_workers_for_resource_request(self) -> int:
        return self._sizes[-1]

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._asked = self._seen = 0
        self._maybe_send_resource_request()  # for an autoscaler, if there is one
        try:
            if self._control.asked() == "stop":
                raise StoppedWhileWaiting("asked to stop while waiting for machines")
            self._control.done()
            room = self._room()
        except _AWAY as error:
            say(f"the head node does not answer: {error}")
            time.sleep(_LOOK_S)
            return NoopDecision()
        if time.monotonic() - self._refused < _REFUSED_S:  # there is less room than the nodes' sizes say
            room = min(room, max((size for size in self._sizes if size < self._tried), default=self._tried))
        usable = [size for size in self._sizes if size <= room]
        if usable:
            self._tried, self._reminded = usable[-1], float("-inf")
            return self._get_resize_decision(self._tried)
        self._remind(room)
        time.sleep(_PAUSE_S)  # the controller would ask again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        running, now = worker_group_state.num_workers, time.monotonic()
        self._maybe_send_resource_request()
        if (
            running == self._sizes[-1]
            or self._asked
            or now - max(self._looked, worker_group_state.start_time) < _LOOK_S
        ):
            return NoopDecision()
        self._looked = now
        try:
            room = min(self._room(), running + self._free())
            better = max((size for size in self._sizes if running < size <= room), default=0)
            if better and better == self._seen:  # twice in a row: a node that has just come may not have come to stay
                say(f"there is room for {better} workers instead of {running}: saving, then going on with them")
                self._control.ask("resize")
                self._asked = better
            self._seen = better
        except _AWAY:  # the head node; training goes on without it, and the next look may find it
            self._seen = 0
        return NoopDecision()

    def not_placed(self) -> int:
        """The workers that were decided upon could not be started; try fewer for a while. How many were tried."""
        self._refused = time.monotonic()
        return self._tried

    def _room(self) -> int:
        """How many workers the live nodes are large enough for, whoever else is there."""
        leaving = ray._private.state.state.get_draining_nodes()
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        return int(self._count_possible_workers({name: r for name, r in nodes.items() if name not in leaving}))

    def _free(self) -> int:
        """For how many more there is room beside everything that runs now."""
        leaving = ray._private.state.state.get_draining_nodes()
        free = ray._private.state.available_resources_per_node()
        return int(self._count_possible_workers({name: r for name, r in free.items() if name not in leaving}))

    def _remind(self, room: int) -> None:
        now = time.monotonic()
        if now - self._reminded < _REMIND_S:
            return
        needed = self.scaling_config._resources_per_worker_not_none
        say(f"waiting: the cluster has room for {room} workers of {needed}, needed are {self._sizes[0]}")
        if self._reminded == float("-inf"):
            RunDir(storage_at(**self._recipe)).note("waiting", say, room=room, needed=self._sizes[0])
        self._reminded = now


class Restarts(DefaultFailurePolicy):
    """Ray's own rules, but for what is no failure, what no restart mends, and storage that fails the controller.

    Args:
        failure_config: the limits.
        count: told of workers that could not be placed.
        recipe: of the run directory's storage, for the ledger.
    """

    def __init__(self, failure_config: FailureConfig, count: WorkerCount, recipe: dict[str, Any]) -> None:
        super().__init__(failure_config)
        self._count, self._recipe, self._troubles = count, recipe, 0

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        workers = getattr(training_failed_error, "worker_failures", {})
        trouble = getattr(training_failed_error, "controller_failure", None)
        if is_planned(workers):
            return FailureDecision.RETRY
        if any(isinstance(error, BadStepError) for error in workers.values()):
            return FailureDecision.RAISE
        if isinstance(trouble, RETRYABLE_CONTROLLER_ERRORS):
            say(f"{self._count.not_placed()} workers could not be started: {' '.join(str(trouble).split())[:200]}")
        elif isinstance(trouble, OSError) and self._troubles < _TROUBLES:
            # Ray's list of checkpoints, on a full disk for example; the manifests are what counts.
            self._troubles += 1
            text = f"{type(trouble).__name__}: {trouble}"
            say(f"Ray's controller could not use the storage, starting the workers again: {text}")
            RunDir(storage_at(**self._recipe)).note("controller_trouble", say, error=text[:500])
            return FailureDecision.RETRY
        return super().make_decision(training_failed_error)


class Trainer(TorchTrainer):
    """A TorchTrainer with these policies.

    Args:
        sizes: numbers of workers that can be used, ascending.
        control: of this job.
        recipe: of the run directory's storage.
        options: as for TorchTrainer.
    """

    def __init__(
        self, *args: Any, sizes: Sequence[int], control: Control, recipe: dict[str, Any], **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._sizes, self._control, self._recipe = sizes, control, recipe

    def fit(self) -> Result:
        count = WorkerCount(self.scaling_config, self._sizes, self._control, self._recipe)
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            result = self._initialize_and_run_controller(
                train_fn_ref=ObjectRefWrapper(self._get_train_func()),
                scaling_policy=count,
                failure_policy=Restarts(self.run_config.failure_config or FailureConfig(), count, self._recipe),
                train_run_context=self.train_run_context,
                callbacks=self._create_default_callbacks(),
                validation_config=self.validation_config,
            )
        finally:
            for number, handler in before.items() if in_main_thread else ():
                signal.signal(number, handler)
        if result.error:
            raise result.error
        return result

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ctrl-C and SIGTERM have the workers save and leave; a second one ends the job as it stands."""
        super()._register_sigint_handler(controller)
        abort = signal.getsignal(signal.SIGINT)
        asked = threading.Event()

        def leave(number: int, frame: FrameType | None) -> None:
            if asked.is_set():
                assert callable(abort)
                abort(number, frame)
                return
            asked.set()
            print("saving, then stopping; once more to stop at once", flush=True)
            # In a thread: the call that was interrupted may hold what this one needs.
            threading.Thread(target=self._control.ask, args=("stop",), daemon=True).start()

        signal.signal(signal.SIGINT, leave)
        signal.signal(signal.SIGTERM, leave)
