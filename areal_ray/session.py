"""The loop's RunContext over Ray Train."""

from __future__ import annotations

import logging

from ray.train import Checkpoint, get_context, report
from ray.train import CheckpointUploadMode as Upload
from ray.train.v2._internal.execution import context as ray_context

from areal_ray.faults import Faults
from areal_ray.rundir import RunDir


class RaySession:
    """Tells Ray what is committed, and the ledger with it.

    Args:
        faults: what is to go wrong on purpose.
        run: the run directory; None on all ranks but the first.
        attempt: of this start of the workers.
    """

    def __init__(self, faults: Faults, run: RunDir | None, attempt: int) -> None:
        self._faults, self._run, self._attempt = faults, run, attempt
        self._storage = get_context().get_storage()
        # Ray announces every report of every rank, by a logger that RunConfig's log level does not reach.
        ray_context.logger.setLevel(logging.WARNING)

    def before_step(self, step: int) -> None:
        self._faults.before_step(step)

    def saved(self, step: int, checkpoint: str, metrics: dict[str, float]) -> None:
        """Register a checkpoint that lies in its final place: Ray neither moves nor copies it."""
        if self._run is not None:
            self._run.event("saved", attempt=self._attempt, step=step, checkpoint=checkpoint)
        report(
            {"step": step, **metrics},
            checkpoint=Checkpoint(
                self._storage.build_checkpoint_path_from_name(checkpoint), self._storage.storage_filesystem
            ),
            checkpoint_upload_mode=Upload.NO_UPLOAD,
        )
