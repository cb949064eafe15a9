"""TorchTrainer and TrainController with our policies, and workers that save and leave when the job is asked to stop."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import ray
from ray import cloudpickle
from ray.train import FailureConfig, Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController

from areal_ray.cluster import ray_internals
from areal_ray.cluster.bad_devices import BadNodes
from areal_ray.cluster.console import say
from areal_ray.cluster.ray_internals import blocking_get_variable, on_this_node
from areal_ray.cluster.requests import AWAY, Requests
from areal_ray.controller.failure_policy import FailurePolicy
from areal_ray.controller.placement import PlacementGroupCache, release_all
from areal_ray.controller.preemption import ThreadedPreemptionCallback
from areal_ray.controller.restart_policy import RestartPolicy
from areal_ray.controller.scaling_policy import ScalingPolicy
from areal_ray.controller.worker_count import WorkerCount
from areal_ray.controller.worker_group import Groups
from areal_ray.run.directory import RunDir


class Heartbeat:
    """Sign of life of a process, in the head node's store: begun there, looked at in another one.

    A controller that is stopped (SIGSTOP, a debugger, swapping) is alive for Ray, and the job would wait for ever.

    Args:
        key: in the store, unique to the process.
        limit_s: seconds without a beat after which it counts as dead, while the store answers.
        every_s: seconds between two beats, and two looks.
        clock: seconds, monotonic.
    """

    def __init__(
        self, key: str, limit_s: float = 40.0, every_s: float = 4.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._key, self.limit_s, self.every_s, self._clock = key, limit_s, every_s, clock
        self._last: bytes | None = None
        self._since = self._looked = clock()

    def begin(self) -> None:
        """Beat from now on, from a thread, until this process ends."""
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _beat(self) -> None:
        for number in count():
            with suppress(*AWAY):  # the head node; nobody is taken for dead meanwhile
                ray_internals.put(self._key, str(number).encode())
            time.sleep(self.every_s)

    def has_stopped(self) -> bool:
        """Look; whether the other process has been silent for too long. One that has not begun yet is not."""
        try:
            beat = ray_internals.get(self._key)
        except AWAY:
            beat = None
        now = self._clock()
        # This process, too, may have been stopped.
        if beat is None or beat != self._last or now - self._looked > self.limit_s / 2:
            self._last, self._since = beat, now
        self._looked = now
        return now - self._since > self.limit_s

    def forget(self) -> None:
        """Remove the key, if the head node is there to be told."""
        with suppress(*AWAY):
            ray_internals.delete(self._key)


class Controller(TrainController):
    """Ray's, with policies that know each other: as arguments of their own they would reach it as separate copies.

    Args:
        policies: for scaling and for failures.
        heartbeat: of its process.
        options: as for TrainController.
    """

    def __init__(
        self, policies: tuple[ScalingPolicy, FailurePolicy], heartbeat: Heartbeat | None = None, **options: Any
    ) -> None:
        if heartbeat is not None:
            heartbeat.begin()
        super().__init__(scaling_policy=policies[0], failure_policy=policies[1], **options)
        self._placement_groups = PlacementGroupCache()
        self.worker_group_cls = Groups(self._placement_groups)
        callbacks = self._worker_group_callbacks_to_propagate
        for i, each in enumerate(callbacks):
            if isinstance(each, PreemptionCallback):
                callbacks[i] = ThreadedPreemptionCallback()
        write = self._checkpoint_manager._write_state_to_storage

        def try_to_write() -> None:
            # Ray's list is rebuilt before it is read, see snapshot.py: no reason to restart healthy workers.
            try:
                write()
            except OSError as error:
                say(f"could not write Ray's list of checkpoints: {error}")

        self._checkpoint_manager._write_state_to_storage = try_to_write

    def _start_worker_group(self, *args: Any, **kwargs: Any) -> None:
        if self._failure_policy.troubled:  # one of these nodes may be why; others are taken first if they are free
            self._placement_groups.release()
        try:
            super()._start_worker_group(*args, **kwargs)
        except Exception:
            self._placement_groups.release()  # the controller may wait next, for hours
            raise

    async def _shutdown(self) -> Any:
        try:
            return await super()._shutdown()
        finally:
            self._placement_groups.release()


class ByValue:
    """A training function in the place of Ray's reference to one in the object store; some kilobytes.

    A worker on a node that is new to the job would fetch that from a node that has a copy, and wait ten seconds if that
    is the one that has just died.

    Args:
        function: to train with.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._pickled: bytes = cloudpickle.dumps(function)  # the controller, which hands it on, need not import it

    def get(self) -> Callable[[], Any]:
        function: Callable[[], Any] = cloudpickle.loads(self._pickled)
        return function


class Trainer(TorchTrainer):
    """A TorchTrainer whose controller has our policies.

    Args:
        sizes: numbers of workers that can be used, ascending.
        requests: to this job.
        run: the run directory.
        skip_poison_steps: as in the configuration.
        options: as for TorchTrainer.
    """

    def __init__(
        self,
        *args: Any,
        sizes: Sequence[int],
        requests: Requests,
        run: RunDir,
        skip_poison_steps: bool,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._sizes, self._requests, self._run_directory, self._skip = sizes, requests, run, skip_poison_steps

    def fit(self) -> Result:
        run, worker = self._run_directory, self.scaling_config._resources_per_worker_not_none
        limits = self.run_config.failure_config or FailureConfig()
        bad_nodes = BadNodes(run, say)
        bad_nodes.load()
        workers = WorkerCount(self._sizes, self._requests, run, bad_nodes, worker, say)
        rules = RestartPolicy(workers, run, bad_nodes, limits.max_failures, self._skip, say)
        scaling = ScalingPolicy(self.scaling_config, workers, bad_nodes, self._requests)
        try:
            result = self._run(
                policies=(scaling, FailurePolicy(rules)),
                train_fn_ref=ByValue(self._get_train_func()),
                train_run_context=self.train_run_context,
                callbacks=self._create_default_callbacks(),
            )
        except ray.exceptions.RayError:
            with suppress(*AWAY):  # the head node may be why
                release_all(self.train_run_context)
            raise
        if result.error:
            raise result.error
        return result

    def _run(self, **options: Any) -> Result:
        """Start the controller on this node and wait for its end. RayError if it dies."""
        environment = {blocking_get_variable(): "0", **get_env_vars_to_propagate()}
        known = ray.get_runtime_context().runtime_env.get("env_vars", {})
        # With an environment of its own it could be none of the processes that have been started ahead.
        own = {} if environment.items() <= known.items() else {"runtime_env": {"env_vars": environment}}
        actor = ray.remote(num_cpus=0, label_selector=on_this_node(), **own)(Controller)
        heartbeat = Heartbeat(f"heartbeat/{secrets.token_hex(8)}")
        controller = actor.remote(heartbeat=heartbeat, **options)
        try:
            run = controller.run.remote()
            while not ray.wait([run], timeout=heartbeat.every_s)[0]:
                if heartbeat.has_stopped():
                    text = (
                        f"Ray Train's controller has not shown a sign of life for {heartbeat.limit_s:.0f} s: ending it"
                    )
                    print(text, flush=True)
                    ray.kill(controller)
                    break
            ray.get(run)
            result: Result = ray.get(controller.get_result.remote())
        except ray.exceptions.RayError:
            with suppress(*AWAY):
                ray.kill(controller)  # it may be out of reach only; there must not be two
            raise
        finally:
            heartbeat.forget()
        return result

    def _create_default_callbacks(self) -> list[Any]:
        # Actors that would be started for nothing: for datasets, of which there are none, and to give back placement
        # groups of a dead controller, which `fit` does.
        idle = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, idle)]
