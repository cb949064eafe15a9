"""Training with Ray's public API alone: every attempt is one `TorchTrainer.fit`, and restarts are decided here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from areal_ray.cluster.bad_devices import BadNodes
from areal_ray.cluster.nodes import use_own_interface
from areal_ray.cluster.requests import AWAY, requests_to
from areal_ray.config import Config
from areal_ray.controller.failure_report import Reporter
from areal_ray.controller.restart_policy import RestartPolicy
from areal_ray.controller.worker_count import WorkerCount, room_for
from areal_ray.run.directory import SNAPSHOT
from areal_ray.run.job_context import JobContext

_HEAD_S = 5.0  # between two tries while the head node is away


class StockTrainer:
    """Runs a job attempt by attempt, with Ray Train as it is.

    Each attempt begins in new processes with all their imports, so that a restart takes longer. A run with a range of
    workers begins with as many as there is room for; more machines are used at the next start only.

    Args:
        config: with absolute paths.
        context: of this submission.
        train: called by Ray Train in every worker.
        torch, run: options of TorchConfig and RunConfig.
        pause_s: time between two looks for machines, in seconds.
    """

    def __init__(
        self,
        config: Config,
        context: JobContext,
        train: Callable[[], dict[str, Any]],
        torch: Mapping[str, Any],
        run: Mapping[str, Any],
        pause_s: float = 0.5,
    ) -> None:
        self._config, self._context, self._pause_s = config, context, pause_s
        self._train, self._torch, self._run = train, torch, run
        self._requests = requests_to(context.submission, fast_restarts=False)
        self._worker = config.worker_resources
        self._bad_nodes = BadNodes(context.run, _print)
        told = self._bad_nodes, self._worker, _print
        self._count = WorkerCount(config.usable_sizes, self._requests, context.run, *told)
        limit, skip = config.cluster.max_failures, config.train.skip_poison_steps
        self._rules = RestartPolicy(self._count, context.run, self._bad_nodes, limit, skip, _print)

    def fit(self) -> dict[str, Any]:
        """Train until the workers have come to an end; returns the outcome of `worker.main`.

        Raises:
            TrainingFailedError: when the run is given up.
            StoppedWhileWaiting: when it is asked to stop and nothing runs.
            RayError: when the controller dies.
            OSError: if Ray's list of checkpoints cannot be removed, or the ledger not be read.
        """
        self._bad_nodes.load()
        while True:
            size = self._wait_for_room()
            self._remove_snapshot()
            try:
                return self._attempt(size)
            except TrainingFailedError as error:
                if not self._rules.should_restart(error):
                    raise

    def _wait_for_room(self) -> int:
        """Wait until there is room, having the cluster's autoscaler, if it has one, make it."""
        bundles = [{name: amount for name, amount in self._worker.items() if amount > 0}] * self._count.sizes[-1]
        asked = False
        try:
            while True:
                try:
                    self._count.check_stop()
                    size = self._count.choose(room_for(self._nodes(), self._worker, self._count.sizes[-1]))
                    if size is not None:
                        return size
                    asked = True
                    labels = self._bad_nodes.labels(ray.nodes)
                    selectors = {"bundle_label_selectors": [labels] * len(bundles)} if labels else {}
                    # Each time: a head node that was away may have forgotten it.
                    request_resources(bundles=bundles, **selectors)
                except AWAY as error:
                    print(f"the head node does not answer: {error}", flush=True)
                    time.sleep(_HEAD_S)
                time.sleep(self._pause_s)
        finally:
            if asked:
                with suppress(*AWAY):  # with a head node that is gone the request is, too
                    request_resources(bundles=[])

    def _nodes(self) -> list[dict[str, float]]:
        """Resources of the nodes that can be used."""
        nodes = ray.nodes()
        left_out = self._bad_nodes.ids(lambda: nodes)
        return [node["Resources"] for node in nodes if node["Alive"] and node["NodeID"] not in left_out]

    def _remove_snapshot(self) -> None:
        """A torn list, or one that names a checkpoint that is gone, would end the run; the manifests say it all."""
        with suppress(FileNotFoundError):
            self._context.run.storage.remove(SNAPSHOT)

    def _attempt(self, size: int) -> dict[str, Any]:
        """Fit once, in a thread: in the main thread Ray would take Ctrl-C for itself (driver/signals.py)."""
        ended: list[dict[str, Any] | BaseException] = []

        def fit() -> None:
            try:
                ended.append(self._trainer(size).fit().return_value)
            except BaseException as error:  # noqa: BLE001  (raised again below)
                ended.append(error)

        thread = threading.Thread(target=fit, name="fit", daemon=True)
        thread.start()
        thread.join()
        (end,) = ended
        if isinstance(end, BaseException):
            raise end
        return end

    def _trainer(self, size: int) -> TorchTrainer:
        gpu = self._config.cluster.use_gpu
        no_retries = FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0)
        return TorchTrainer(
            self._train,
            torch_config=OwnInterface(**self._torch),
            scaling_config=ScalingConfig(
                num_workers=size,
                use_gpu=gpu,
                resources_per_worker=self._worker,
                label_selector=self._bad_nodes.labels(ray.nodes),
            ),
            run_config=RunConfig(
                **self._run, failure_config=no_retries, callbacks=[Reporter(self._context.run, marks=False)]
            ),
        )


class OwnInterface(TorchConfig):
    """Ray's, for ranks that speak through the interface with their node's Ray address."""

    @property
    def backend_cls(self) -> Any:
        class Backend(super().backend_cls):  # type: ignore[misc]
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                worker_group.execute(use_own_interface)
                super().on_start(worker_group, backend_config)

        return Backend


def _print(text: str) -> None:
    print(text, flush=True)
