"""RunContext of the training loop over Ray Train."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import ray
from ray.train import Checkpoint, report
from ray.train import CheckpointUploadMode as Upload

from areal_ray.checkpoint import Manifest
from areal_ray.cluster.ray_internals import is_preempted
from areal_ray.cluster.requests import AWAY, Reason, Requests
from areal_ray.cluster.spare_nodes import SpareNodes
from areal_ray.cluster.standbys import Standbys
from areal_ray.distributed import RankError, Ranks
from areal_ray.run.fence import RunTaken
from areal_ray.storage import Storage
from areal_ray.train.faults import Faults
from areal_ray.train.recovery import PendingSave
from areal_ray.worker.stragglers import StragglerDetector
from areal_ray.worker.watchdog import Watchdog

_CALM_STEPS, _CALM_S = 4, 4.0  # after so much training new standbys are not in its way
_LISTEN_S = 0.5  # between two looks at the requests to the job
_REASONS: tuple[Reason | None, ...] = (None, "stop", "resize", "preempted")


class RaySession:
    """Reports committed checkpoints to Ray, and polls for requests to leave and for node preemption.

    Args:
        faults: injected on purpose.
        ranks: all ranks.
        requests: polled by rank 0.
        storage: the run directory, which is Ray Train's as well.
        standbys: to be replenished when training is under way.
        watchdog: told of progress; None if there is none.
        fast_restarts: as in JobContext. If not, Ray Train is asked for preemption by its public function, which is a
            barrier of all ranks, with every report.
    """

    def __init__(
        self,
        faults: Faults,
        ranks: Ranks,
        requests: Requests,
        storage: Storage,
        standbys: Sequence[Standbys | SpareNodes] = (),
        watchdog: Watchdog | None = None,
        fast_restarts: bool = True,
    ) -> None:
        self._faults, self._ranks, self._requests = faults, ranks, requests
        self._fast_restarts, self._preempted = fast_restarts, False
        self._standbys, self._watchdog = standbys, watchdog
        self._steps, self._began = 0, time.monotonic()  # of this attempt
        self._step = 0
        # Both look at parts that are wired around this one: told of every step that is finished, and of the first.
        self.stragglers: StragglerDetector | None = None
        self.first_step: Callable[[int], None] | None = None
        self.computing: int | None = None  # the step that is being computed
        self._storage = storage
        self._error: Exception | None = None
        self._asked: Reason | None = None
        self.reason: Reason | None = None  # why the workers leave, the same on all ranks
        if ranks.rank == 0:
            threading.Thread(target=self._listen, name="requests", daemon=True).start()
        _quiet_reports()

    def leaving(self) -> bool:
        """Whether to leave after this step. One word of rank 0 to all, so that they leave together."""
        self.computing = None
        if self.first_step:
            self.first_step(self._step)
            self.first_step = None
        if self.stragglers:
            self.stragglers.after_step()
        # The notice reaches every worker; Ray's own get_preemption_info() waits for all ranks on an actor each time.
        preempted = is_preempted() if self._fast_restarts else self._preempted
        mine: Reason | None = "preempted" if preempted else self._asked
        self.reason = _REASONS[self._ranks.broadcast_int(_REASONS.index(mine))]
        return self.reason is not None

    def _listen(self) -> None:
        while self._asked is None:
            try:
                self._asked = self._requests.asked()
            except AWAY as error:  # the head node is away; when it is back, listen on
                logging.getLogger(__name__).warning("cannot hear requests: %s", error)
            time.sleep(_LISTEN_S)

    def enter(self, phase: str) -> None:
        self._enter(phase, None)

    def _enter(self, phase: str, step: int | None) -> None:
        self.computing = step
        if self._watchdog:
            self._watchdog.beat(phase, step)

    def before_step(self, step: int) -> None:
        self.check()
        self._enter("step", step)
        self._step = step
        self._steps += 1
        if self._standbys and self._steps > _CALM_STEPS and time.monotonic() - self._began > _CALM_S:
            for each in self._standbys:
                each.replenish()
            self._standbys = ()
        self._faults.before_step(step)

    def check(self) -> None:
        """Raise an error of the background: after a report that failed, Ray would wait for the next for ever."""
        if self._error is not None:
            raise self._error

    def saving(self, dump: PendingSave, metrics: dict[str, float]) -> None:
        """Have a checkpoint registered once it is committed. It lies where it stays; Ray copies nothing.

        The report, a barrier of all ranks on an actor, is made by the thread that learns of the commit, and for a save
        that failed there is none: Ray's own asynchronous report would take a failed upload for the end of training.
        """
        path = f"{self._storage.location.removeprefix('s3://')}/{dump.name}"  # without a scheme, as pyarrow has it
        values = {"step": dump.step, **metrics}

        def register(manifest: Future[Manifest | None]) -> None:
            if self._error is not None:
                return
            if isinstance(error := manifest.exception(), RankError) and error.only(RunTaken):
                self._error = error  # not at the next save only
            if error is not None:
                return
            try:
                checkpoint = Checkpoint(path, self._storage.filesystem)
                report(values, checkpoint=checkpoint, checkpoint_upload_mode=Upload.NO_UPLOAD)
                if not self._fast_restarts:
                    # Here, as Ray's barriers know no names: one rank's question would meet another one's report.
                    self._preempted = ray.train.get_preemption_info() is not None
            except Exception as error:  # noqa: BLE001  (a future drops exceptions of its callbacks; see check)
                self._error = error

        dump.manifest.add_done_callback(register)


def _quiet_reports() -> None:
    """Silence Ray's announcement of every report of every rank."""
    folder = str(Path(ray.__file__).parent / "train")  # its logger is named by its file, out of LoggingConfig's reach
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(folder):
            logging.getLogger(name).setLevel(logging.WARNING)
