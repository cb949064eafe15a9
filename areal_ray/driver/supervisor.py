"""Supervision of Ray Train: when its controller itself dies, it is started again and the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from areal_ray.checkpoint import Catalog
from areal_ray.cluster import failures
from areal_ray.cluster.console import leave_out_marks
from areal_ray.cluster.requests import requests_to
from areal_ray.cluster.standbys import Standbys
from areal_ray.config import Config
from areal_ray.controller.failure_report import Reporter
from areal_ray.driver.connect import BESIDE
from areal_ray.driver.stock_trainer import StockTrainer
from areal_ray.processes.fork_server import process_environment
from areal_ray.run.directory import RunDir
from areal_ray.run.job_context import JobContext

_WORKER = "areal_ray.worker.main"  # not imported here: modules that only workers need take the driver half a second
_START_S = 300.0  # limit of a start at least: with cold imports from a slow disk
_CONTROLLER_DEATHS = 6  # in a row, without a new checkpoint, that end the run
_LONGEST_WAIT_S = 60.0


def supervise(fit: Callable[[], dict[str, Any]], run: RunDir, sleep: Callable[[float], object] = time.sleep) -> Any:
    """Train until the workers have come to an end.

    Failures of workers are the business of a RestartPolicy; here it is about the controller, an actor that Ray does not
    restart.

    Args:
        fit: starts Ray Train and returns the outcome of rank 0; called again after the controller's death.
        run: the run directory.
        sleep: waits so many seconds.

    Returns:
        The outcome that `fit` returned.

    Raises:
        TrainingFailedError: when the run is given up.
        RayError: when the controller cannot be kept alive. Storage that is away is waited for, however long.
    """
    catalog = Catalog(run.storage)
    deaths = 0
    newest: str | None = None
    while True:
        try:
            return fit()
        except (RayError, OSError) as error:
            before = newest
            with suppress(OSError):  # storage is why one is here, perhaps
                newest = catalog.last_committed()
            deaths = deaths + 1 if newest == before else 1
            if deaths >= _CONTROLLER_DEATHS and isinstance(error, RayError):
                raise
            cause = failures.cause_of(error, run)
            print(f"{cause.kind}: {cause.message[:200]}; starting Ray Train again", flush=True)
            run.note("controller_died", print, error=f"{cause.kind}: {cause.message[:500]}")
            sleep(min(_LONGEST_WAIT_S, 2.0 ** (deaths - 2)) if deaths > 1 else 0.0)


def choose_fit(config: Config, context: JobContext) -> Callable[[], dict[str, Any]]:
    """Make the function that starts Ray Train: with our controller, or with Ray's public API alone.

    Args:
        config: with absolute paths.
        context: of this submission; its `fast_restarts` decides.
    """
    if context.fast_restarts:
        return lambda: _fit_with_our_controller(config, context)
    # The workers' own, too: of a connection that there was before, the job's processes have not heard of it.
    options = {**_run(config, context), "worker_runtime_env": {"env_vars": process_environment(config)}}
    return StockTrainer(config, context, _train_function(config, context), _torch(config), options).fit


def _fit_with_our_controller(config: Config, context: JobContext) -> dict[str, Any]:
    # Imported here: our controller subclasses Ray's, which an unknown Ray may not have.
    from areal_ray.controller import snapshot
    from areal_ray.controller.rendezvous import GroupTorchConfig
    from areal_ray.controller.trainer import Trainer
    from areal_ray.controller.worker_group import GroupLife
    from areal_ray.driver import warm_start

    run, wanted = context.run, config.cluster
    beside = Standbys("plain", BESIDE, lambda *_: None, lambda _: None) if config.standbys(1) else None
    snapshot.rebuild(run.storage)
    trainer = Trainer(
        _train_function(config, context),
        torch_config=GroupTorchConfig(**_torch(config)),
        scaling_config=ScalingConfig(
            num_workers=config.worker_range, use_gpu=wanted.use_gpu, resources_per_worker=config.worker_resources
        ),
        run_config=RunConfig(
            **_run(config, context),
            failure_config=FailureConfig(max_failures=wanted.max_failures),
            callbacks=[Reporter(run), GroupLife(run, max(_START_S, wanted.collective_timeout_s), beside)],
            worker_runtime_env={"env_vars": process_environment(config) | warm_start.worker_environment(config)},
        ),
        sizes=config.usable_sizes,
        requests=requests_to(context.submission, context.fast_restarts),
        run=run,
        skip_poison_steps=config.train.skip_poison_steps,
    )
    outcome: dict[str, Any] = trainer.fit().return_value
    return outcome


def _train_function(config: Config, context: JobContext) -> Callable[[], dict[str, Any]]:
    """Make the function that Ray Train calls in every worker."""
    module = _WORKER

    def train() -> dict[str, Any]:
        # Not as train_loop_config, which Ray shows on its dashboard, with credentials if there are any.
        if not context.fast_restarts:
            leave_out_marks()
        outcome: dict[str, Any] = import_module(module).main(config, context)
        return outcome

    return train


def _torch(config: Config) -> dict[str, Any]:
    """Options of the TorchConfig. Checkpoints take a process group for the CPU, too."""
    backend = "cpu:gloo,cuda:nccl" if config.cluster.use_gpu else "gloo"
    return {"backend": backend, "timeout_s": int(config.cluster.collective_timeout_s)}


def _run(config: Config, context: JobContext) -> dict[str, Any]:
    """Options of the RunConfig."""
    files = context.run.storage.filesystem
    root = config.run.storage_path.removeprefix("s3://") if files else config.run.storage_path
    place = {"name": config.run.name, "storage_path": root, "storage_filesystem": files}
    return {**place, "checkpoint_config": CheckpointConfig(), "logging_config": LoggingConfig(log_level="CRITICAL")}
