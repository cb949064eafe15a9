"""The run's journal: lines on the screen and events in the ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial

from areal_ray.checkpoint import Catalog
from areal_ray.checkpoint.retention import Retention
from areal_ray.config import KeepConfig
from areal_ray.distributed import RankError, Ranks
from areal_ray.run import RunDir
from areal_ray.run.fence import RunTaken
from areal_ray.train.bad_steps import Refusal
from areal_ray.train.cadence import AutoCadence
from areal_ray.train.recovery import PendingSave, SaveListener

_NOTABLE_WAIT_S = 0.5


class Journal:
    """A Journal that writes to the run's ledger.

    Args:
        run: the run directory; None on all ranks but the first, which is the only one that writes.
        attempt: of this start of the workers.
        say: prints a line for the user.
        retention: told when a save has ended; None where nothing is saved.
    """

    def __init__(
        self, run: RunDir | None, attempt: int, say: Callable[[str], None], retention: Retention | None = None
    ) -> None:
        self._run, self._attempt, self._say, self._retention = run, attempt, say, retention

    def begins(self, checkpoint: str, step: int) -> None:
        self._event("save_began", step=step, checkpoint=checkpoint)

    def saved(self, save: PendingSave, blocked_s: float, waited_s: float, total_s: float) -> None:
        if self._run is None or self._retention is None:
            return
        times = {"blocked_s": round(blocked_s, 4), "waited_s": round(waited_s, 4), "total_s": round(total_s, 4)}
        if waited_s > _NOTABLE_WAIT_S:
            self._say(f"the save at step {save.step} waited {waited_s:.1f} s for the one before: storage is slow")
        error = save.manifest.exception()
        if isinstance(error, RankError) and error.only(RunTaken):
            return  # nothing is written or deleted any more; the session ends this worker
        if error is None:
            manifest = save.manifest.result()
            assert manifest is not None  # this is rank 0
            self._event("saved", step=save.step, checkpoint=save.name, bytes=manifest.total_bytes, **times)
            self._retention.committed(save.name, manifest)
        else:
            self._say(f"saving {save.name} failed: {error}")
            # First: what has made the save fail may make this fail, too.
            self._event("save_failed", step=save.step, checkpoint=save.name, error=str(error)[:500], **times)
            if not (isinstance(error, RankError) and error.only(FileExistsError)):  # it was there before: not ours
                self._retention.discard(save.name)

    def skipped(self, step: int) -> None:
        self._say(f"the save at step {step} falls out: storage is still busy with the one before")
        self._event("save_skipped", step=step)

    def passed_over(self, checkpoint: str, reason: str) -> None:
        self._say(f"passing over {checkpoint}: {reason}")
        self._event("passed_over", checkpoint=checkpoint, reason=reason)
        if self._retention is not None:
            self._retention.distrust(checkpoint)

    def refused(self, refusal: Refusal, first_sample: int, samples: int) -> None:
        """A step must not change the weights; its batch is `samples` of them from cursor `first_sample`."""
        numbers = {"loss": refusal.loss, "grad_norm": refusal.grad_norm}
        said = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
        what = {"skip": "left out", "rollback": "going back to the last checkpoint", "stop": "stopping"}
        self._say(f"step {refusal.step} is bad: {said} ({refusal.reason}); {what[refusal.action]}")
        # JSON has no word for these; `float` reads them back.
        kept = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        place = {"first_sample": first_sample, "samples": samples}
        self._event("bad_step", step=refusal.step, **kept, reason=refusal.reason, action=refusal.action, **place)

    def _event(self, kind: str, **fields: object) -> None:
        if self._run is not None:
            self._run.note(kind, self._say, attempt=self._attempt, **fields)


class TunedSaves:
    """A SaveListener that tells a cadence what saves cost, and another listener everything.

    Args:
        cadence: decides how often to save.
        listener: the other one.
        ranks: of which the first decides.
    """

    def __init__(self, cadence: AutoCadence, listener: SaveListener, ranks: Ranks) -> None:
        self._cadence, self._listener, self._first = cadence, listener, ranks.rank == 0

    def begins(self, checkpoint: str, step: int) -> None:
        self._listener.begins(checkpoint, step)

    def saved(self, save: PendingSave, blocked_s: float, waited_s: float, total_s: float) -> None:
        if self._first:
            self._cadence.ended(blocked_s - waited_s if save.manifest.exception() is None else None)
        self._listener.saved(save, blocked_s, waited_s, total_s)

    def skipped(self, step: int) -> None:
        self._listener.skipped(step)
        if self._first:
            self._cadence.ended(None)

    def passed_over(self, checkpoint: str, reason: str) -> None:
        self._listener.passed_over(checkpoint, reason)


def retention(run: RunDir, attempt: int, say: Callable[[str], None], catalog: Catalog, keep: KeepConfig) -> Retention:
    """The retention of a run's checkpoints, on rank 0: distrusts and reports deletions by the run's ledger."""
    return Retention(
        catalog,
        keep,
        distrusted=lambda: {event["checkpoint"] for event in run.events("passed_over")},
        on_deleted=lambda name: run.note("deleted", say, attempt=attempt, checkpoint=name),
        say=say,
        began=partial(begun_saves, run),
    )


def begun_saves(run: RunDir, names: Collection[str]) -> set[str]:
    """Those of these names that a save of this run has begun, by its ledger. Looks through all of it.

    Of an attempt of a version that did not write that down, every directory with its number counts.
    """
    events = run.events_of("save_began", "attempt")
    begun = {event["checkpoint"] for event in events if event["event"] == "save_began"}
    older = {event["attempt"] for event in events if event["event"] == "attempt" and not event.get("marks_saves")}
    return {name for name in names if name in begun or Catalog.version(name)[0] in older}
