"""The loop's RunContext over Ray Train."""

from __future__ import annotations

import logging

from ray.train import Checkpoint, get_context, report
from ray.train import CheckpointUploadMode as Upload
from ray.train.v2._internal.execution import context as ray_context

from areal_ray.faults import Faults
from areal_ray.recover import Dump


class RaySession:
    """Tells Ray what is committed.

    Args:
        faults: what is to go wrong on purpose.
    """

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._storage = get_context().get_storage()
        # Ray announces every report of every rank, by a logger that RunConfig's log level does not reach.
        ray_context.logger.setLevel(logging.WARNING)

    def before_step(self, step: int) -> None:
        self._faults.before_step(step)

    def saving(self, dump: Dump, metrics: dict[str, float]) -> None:
        """Have a checkpoint registered once it is committed. It lies where it stays; Ray copies nothing."""
        checkpoint = Checkpoint(
            self._storage.build_checkpoint_path_from_name(dump.name), self._storage.storage_filesystem
        )

        def committed(_: Checkpoint, __: str) -> Checkpoint | None:
            # Runs in Ray's upload thread. A failed save is no checkpoint, and not the end of training: Ray hears of
            # metrics only, and the recover handler, which every rank asks, decides what follows.
            return checkpoint if dump.manifest.exception() is None else None

        report(
            {"step": dump.step, **metrics},
            checkpoint=checkpoint,
            checkpoint_upload_mode=Upload.ASYNC,
            checkpoint_upload_fn=committed,
            delete_local_checkpoint_after_upload=False,  # the default deletes what was just written
        )
