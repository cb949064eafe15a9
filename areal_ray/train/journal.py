"""What is said of a run as it goes: lines on the screen, events in the ledger; and older checkpoints let go."""

from __future__ import annotations

import math
from collections.abc import Callable

from areal_ray.checkpoint import Catalog
from areal_ray.checkpoint.manifest import MANIFEST
from areal_ray.checkpoint.retention import deletable, remove, uncommitted
from areal_ray.config import KeepConfig
from areal_ray.run import RunDir
from areal_ray.train.bad_steps import Refusal
from areal_ray.train.recovery import PendingSave

_NOTABLE_WAIT_S = 0.5


class Journal:
    """A Journal that writes to the run's ledger.

    Args:
        run: the run directory; None on all ranks but the first, which is the only one that writes.
        attempt: of this start of the workers.
        say: prints a line for the user.
        catalog, keep: which checkpoints are let go when a new one is committed.
    """

    def __init__(
        self, run: RunDir | None, attempt: int, say: Callable[[str], None], catalog: Catalog, keep: KeepConfig
    ) -> None:
        self._run, self._attempt, self._say = run, attempt, say
        self._catalog, self._keep = catalog, keep

    def saved(self, dump: PendingSave, blocked_s: float, waited_s: float, total_s: float) -> None:
        if self._run is None:
            return
        times = {"blocked_s": round(blocked_s, 4), "waited_s": round(waited_s, 4), "total_s": round(total_s, 4)}
        if waited_s > _NOTABLE_WAIT_S:
            self._say(f"the save at step {dump.step} waited {waited_s:.1f} s for the one before: storage is slow")
        error = dump.manifest.exception()
        if error is None:
            size = dump.manifest.result().total_bytes
            self._event("saved", step=dump.step, checkpoint=dump.name, bytes=size, **times)
            self._let_go()
        else:
            self._say(f"saving {dump.name} failed: {error}")
            # Half of it may be what fills the disk. But if a rank died after the commit, it is a checkpoint.
            if not self._is_committed(dump.name):
                self._remove(dump.name)
            self._event("save_failed", step=dump.step, checkpoint=dump.name, error=str(error)[:500], **times)

    def _is_committed(self, name: str) -> bool:
        try:
            return self._catalog.directory(name).size(MANIFEST) is not None
        except OSError:  # nobody knows; what it left is collected by a later attempt
            return True

    def _let_go(self) -> None:
        assert self._run is not None
        if self._keep.last is None:
            return
        try:
            distrusted = {event["checkpoint"] for event in self._run.events("passed_over")}
            trusted = [entry for entry in self._catalog.entries() if entry.name not in distrusted]
        except OSError as error:  # the next save looks again
            self._say(f"could not look for checkpoints to delete: {error}")
            return
        for entry in deletable(trusted, self._keep):
            if self._remove(entry.name):
                self._event("deleted", checkpoint=entry.name)

    def clean_up(self) -> None:
        """Delete what saves of earlier attempts have left unfinished; called on rank 0."""
        for name in uncommitted(self._catalog, self._attempt):
            if self._remove(name):
                self._event("deleted", checkpoint=name)

    def _remove(self, name: str) -> bool:
        try:
            return remove(self._catalog, name)
        except FileNotFoundError:
            return False
        except OSError as error:  # in the way of nothing: the next time tries again
            self._say(f"could not delete {name}: {error}")
            return False

    def skipped(self, step: int) -> None:
        self._say(f"the save at step {step} falls out: storage is still busy with the one before")
        self._event("save_skipped", step=step)

    def passed_over(self, checkpoint: str, reason: str) -> None:
        self._say(f"passing over {checkpoint}: {reason}")
        self._event("passed_over", checkpoint=checkpoint, reason=reason)

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
