"""Ray Train under supervision: when its controller itself dies, it is started again and the run goes on."""

from __future__ import annotations

import time
from contextlib import suppress
from importlib import import_module
from typing import Any

from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from areal_ray.checkpoint import Catalog
from areal_ray.cluster import failures, standbys
from areal_ray.cluster.requests import Control
from areal_ray.config import Config
from areal_ray.controller import snapshot
from areal_ray.controller.failure_report import Reporter
from areal_ray.controller.rendezvous import GroupTorchConfig
from areal_ray.controller.trainer import Trainer
from areal_ray.controller.worker_group import GroupLife
from areal_ray.driver import warm_start
from areal_ray.driver.connect import BESIDE, resources
from areal_ray.run.job_context import JobContext

_WORKER = "areal_ray.worker.main"  # not imported here: what only workers need takes the driver half a second
_TROUBLES = 6  # deaths of the controller in a row, without a new checkpoint, before they end the run
_LONGEST_WAIT_S = 60.0
_START_S = 300.0  # limit of a start at least: with cold imports from a slow disk


def supervise(config: Config, context: JobContext) -> dict[str, Any]:
    """Train until the workers have come to an end.

    What goes wrong with workers is the controller's business, see restarts.py; here it is about the controller, an
    actor that Ray does not restart, and about Ray's list of checkpoints, without which it does not start.

    Args:
        config: with absolute paths.
        context: of this submission.

    Returns:
        What `worker.main` returned.

    Raises:
        TrainingFailedError: when the run is given up.
        RayError: when the controller cannot be kept alive. Storage that is away is waited for, however long.
    """
    run = context.run
    catalog = Catalog(run.storage)
    troubles = 0
    newest: str | None = None
    while True:
        try:
            snapshot.rebuild(run.storage)
            outcome: dict[str, Any] = _trainer(config, context).fit().return_value
            return outcome
        except (RayError, OSError) as error:
            before = newest
            with suppress(OSError):  # storage is why one is here, perhaps
                newest = catalog.last_committed()
            troubles = troubles + 1 if newest == before else 1
            if troubles >= _TROUBLES and isinstance(error, RayError):
                raise
            cause = failures.cause_of(error, run)
            print(f"{cause.kind}: {cause.message[:200]}; starting Ray Train again", flush=True)
            run.note("controller_died", print, error=f"{cause.kind}: {cause.message[:500]}")
            time.sleep(min(_LONGEST_WAIT_S, 2.0 ** (troubles - 2)) if troubles > 1 else 0.0)


def _trainer(config: Config, context: JobContext) -> Trainer:
    run, files, module = context.run, context.run.storage.filesystem, _WORKER
    root = config.run.storage_path.removeprefix("s3://") if files else config.run.storage_path

    def work() -> dict[str, Any]:
        # Not as train_loop_config, which Ray shows on its dashboard, with credentials if there are any.
        outcome: dict[str, Any] = import_module(module).main(config, context)
        return outcome

    wanted = config.cluster
    beside = standbys.Standbys("plain", BESIDE, lambda *_: None, lambda _: None) if config.standbys(1) else None
    backend = "cpu:gloo,cuda:nccl" if wanted.use_gpu else "gloo"
    return Trainer(
        work,
        torch_config=GroupTorchConfig(backend=backend, timeout_s=int(wanted.collective_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=config.worker_range, use_gpu=wanted.use_gpu, resources_per_worker=resources(config)
        ),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=root,
            storage_filesystem=files,
            failure_config=FailureConfig(max_failures=wanted.max_failures),
            checkpoint_config=CheckpointConfig(),
            callbacks=[
                Reporter(run),
                GroupLife(run, max(_START_S, wanted.collective_timeout_s), beside),
            ],
            logging_config=LoggingConfig(log_level="CRITICAL"),
            worker_runtime_env={"env_vars": warm_start.worker_environment(config)},
        ),
        sizes=config.usable_sizes,
        control=Control(context.submission),
        run=run,
        skip_poison_steps=config.train.skip_poison_steps,
    )
