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
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.util import ObjectRefWrapper

from areal_ray.console import say
from areal_ray.control import Control, is_planned
from areal_ray.rundir import RunDir
from areal_ray.storage import storage_at

_LOOK_S = 5.0  # between two looks for more machines
_REMIND_S = 30.0  # between two lines about machines that are missing
_PAUSE_S = 0.5  # between two looks while nothing runs


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
        self._reminded = self._looked = float("-inf")
        self._asked = self._seen = 0

    def _get_num_workers_for_resource_request(self) -> int:
        return self._sizes[-1]

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._asked = self._seen = 0
        if self._control.asked() == "stop":
            raise StoppedWhileWaiting("asked to stop while waiting for machines")
        self._control.done()
        room = self._room()
        usable = [size for size in self._sizes if size <= room]
        if usable:
            return self._get_resize_decision(usable[-1])
        self._remind(room)
        time.sleep(_PAUSE_S)  # the controller would ask again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        now = time.monotonic()
        self._maybe_send_resource_request()
        if self._asked or now - max(self._looked, worker_group_state.start_time) < _LOOK_S:
            return NoopDecision()
        self._looked = now
        running, room = worker_group_state.num_workers, self._room()
        better = max((size for size in self._sizes if running < size <= room), default=0)
        if better and better == self._seen:  # twice in a row: a node that has just come may not have come to stay
            say(f"there is room for {better} workers instead of {running}: saving, then going on with them")
            self._asked = better
            self._control.ask("resize")
        self._seen = better
        return NoopDecision()

    def _room(self) -> int:
        """How many workers the live nodes have room for, this job's own included."""
        self._maybe_send_resource_request()
        coordinator = self._autoscaling_coordinator
        try:
            reserved = ray.get(coordinator.get_reserved_resources.remote(self._requester_id, True), timeout=10)
        except ray.exceptions.RayError as error:
            say(f"Ray does not say which resources there are: {error}")
            return 0
        leaving = set(ray._private.state.state.get_draining_nodes())
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - leaving
        return int(self._count_possible_workers({node: r for node, r in reserved.items() if node in alive}))

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
    """Ray's own rules, but leaving on request is no failure, and storage that fails the controller ends nothing."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if is_planned(getattr(training_failed_error, "worker_failures", {})):
            return FailureDecision.RETRY
        trouble = getattr(training_failed_error, "controller_failure", None)
        if isinstance(trouble, OSError):  # its list of checkpoints, on a full disk; the manifests are what counts
            say(f"Ray's list of checkpoints could not be written, starting the workers again: {trouble}")
            time.sleep(_LOOK_S)
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
        result = self._initialize_and_run_controller(
            train_fn_ref=ObjectRefWrapper(self._get_train_func()),
            scaling_policy=WorkerCount(self.scaling_config, self._sizes, self._control, self._recipe),
            failure_policy=Restarts(self.run_config.failure_config or FailureConfig()),
            train_run_context=self.train_run_context,
            callbacks=self._create_default_callbacks(),
            validation_config=self.validation_config,
        )
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
