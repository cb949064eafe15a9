"""The loop's RunContext over Ray Train."""

from __future__ import annotations

import logging
from concurrent.futures import Future

from ray.train import Checkpoint, get_context, report
from ray.train import CheckpointUploadMode as Upload
from ray.train.v2._internal.execution import context as ray_context

from areal_ray.checkpoint import Manifest
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
        self._error: Exception | None = None
        # Ray announces every report of every rank, by a logger that RunConfig's log level does not reach.
        ray_context.logger.setLevel(logging.WARNING)

    def before_step(self, step: int) -> None:
        self.check()
        self._faults.before_step(step)

    def check(self) -> None:
        """Raise what went wrong in the background: after a report that failed, Ray would wait for the next for ever."""
        if self._error is not None:
            raise self._error

    def saving(self, dump: Dump, metrics: dict[str, float]) -> None:
        """Have a checkpoint registered once it is committed. It lies where it stays; Ray copies nothing.

        The report, a barrier of all ranks on an actor, is made by the thread that learns of the commit, and for a save
        that failed there is none: Ray's own asynchronous report would take a failed upload for the end of training.
        """
        path = self._storage.build_checkpoint_path_from_name(dump.name)
        values = {"step": dump.step, **metrics}

        def register(manifest: Future[Manifest]) -> None:
            if manifest.exception() is not None or self._error is not None:
                return
            try:
                checkpoint = Checkpoint(path, self._storage.storage_filesystem)
                report(values, checkpoint=checkpoint, checkpoint_upload_mode=Upload.NO_UPLOAD)
            except Exception as error:  # noqa: BLE001  (a future drops what its callbacks raise; see check)
                self._error = error

        dump.manifest.add_done_callback(register)
