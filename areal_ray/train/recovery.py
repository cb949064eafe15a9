"""Recovery: the state of a run, saved and loaded as one checkpoint."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint import Catalog, CheckpointWriter, Copy, Manifest, MemoryCopies, reader
from areal_ray.checkpoint.tree import flatten
from areal_ray.distributed import RankError, Ranks


class TooManyFailedSaves(RankError):
    """Raised when so many saves have failed in a row that training on would be in vain."""


@dataclass(frozen=True)
class PendingSave:
    """A save that was begun: its name in the run directory, the finished steps, its manifest (on rank 0) once it
    is committed."""

    name: str
    step: int
    manifest: Future[Manifest | None]


@dataclass(frozen=True)
class SavePolicy:
    """Policy for saves that storage delays or fails.

    Args:
        skip_when_busy: let a save fall out while the one before is still being written; else training waits for it.
        max_failed_saves: in a row, after which the run stops.
    """

    skip_when_busy: bool = False
    max_failed_saves: int = 3


class SaveListener(Protocol):
    """Listener to saves and loads. `begins` and `saved` are called on every rank, the latter from another thread; the
    others as they say."""

    def begins(self, checkpoint: str, step: int) -> None:
        """Called before anything of a save is there: what it leaves, if it is cut off, can be told from what others
        have left."""
        ...

    def saved(self, save: PendingSave, blocked_s: float, waited_s: float, total_s: float) -> None:
        """Called when a save has ended, well or not: see its manifest."""
        ...

    def skipped(self, step: int) -> None:
        """Called on every rank when a save is skipped."""
        ...

    def passed_over(self, checkpoint: str, reason: str) -> None:
        """Called on rank 0 when a checkpoint cannot be used."""
        ...


class RecoverHandler:
    """Saves and loads a set of named `Stateful` objects: engine, data cursor, progress, clocks.

    After AReaL's recover handler, with DCP as the only format: every save is a directory of its own, and a load takes
    the newest one that proves to be good.

    Args:
        catalog: the run's checkpoints.
        state: what makes the run resumable, by name.
        writer: how it is written.
        journal: told of every save and of every checkpoint that is passed over.
        attempt: number of this start of the workers, part of the names of its saves.
        info: about the run, for the manifest.
        ranks: all ranks.
        policy: what to do when storage is slow or fails.
        memory: for copies that are not written to storage; None: there are none.
    """

    def __init__(
        self,
        catalog: Catalog,
        state: Mapping[str, Stateful],
        writer: CheckpointWriter,
        journal: SaveListener,
        attempt: int,
        info: Mapping[str, Any],
        ranks: Ranks,
        policy: SavePolicy,
        memory: MemoryCopies | None = None,
    ) -> None:
        self._catalog, self._state, self._writer, self._journal = catalog, state, writer, journal
        self._attempt, self.info, self._ranks, self._policy = attempt, info, ranks, policy
        self._memory = memory
        self._last: PendingSave | None = None
        self._failed_in_a_row = 0

    def prepare(self) -> None:
        """To be called once before training: get ready for the first save and copy. A collective."""
        if self._memory is not None:  # first: it looks whether there is room
            self._memory.prepare(self._state)
        self._writer.prepare(self._state)

    def save(self, step: int, metrics: Mapping[str, float], must: bool = False) -> PendingSave | None:
        """Begin to save everything. A collective.

        A save that fails because of the storage is written down and tried again with the next one; older checkpoints
        are not touched. At most one is under way: the one before is waited for, or this one is skipped.

        Args:
            step: finished steps.
            metrics: how good the model is, for the manifest.
            must: never skip.

        Returns:
            What is under way (or done); None if it was skipped.

        Raises:
            TooManyFailedSaves: on every rank.
        """
        began = time.perf_counter()
        busy = self._last is not None and not self._ranks.agree(self._last.manifest.done())
        if busy and self._policy.skip_when_busy and not must:
            self._journal.skipped(step)
            return None
        self.wait()
        waited = time.perf_counter() - began
        name = self._catalog.name(step, self._attempt)
        place = {"step": step, "attempt": self._attempt, "time": round(time.time(), 3)}
        info = {**self.info, **place, "metrics": dict(metrics)}
        self._journal.begins(name, step)
        manifest = self._writer.begin(self._catalog.directory(name), self._state, info)
        self._last = PendingSave(name, step, manifest)
        blocked = time.perf_counter() - began
        manifest.add_done_callback(
            lambda _, save=self._last: self._journal.saved(save, blocked, waited, time.perf_counter() - began)  # type: ignore[misc]
        )
        return self._last

    def save_to_memory(self, step: int) -> None:
        """Copy everything to memory, if there are to be such copies. A collective."""
        if self._memory is not None:
            self._memory.save((self._attempt, step), self._state, self.info)

    def wait_for_copy(self) -> None:
        """To be called before the state changes next: waits, on the device, for what is still being copied."""
        self._writer.fence()
        if self._memory is not None:
            self._memory.fence()

    def values(self) -> dict[str, Any]:
        """The plain values of the state as it is now, by object: what state.json would hold."""
        return flatten({name: part.state_dict() for name, part in self._state.items()})[1]

    def wait(self) -> None:
        """Wait for the save that is under way, if any. A collective.

        Raises:
            TooManyFailedSaves: on every rank.
        """
        if self._last is None:
            return
        last, self._last = self._last, None
        error = last.manifest.exception()
        if error is None:
            self._failed_in_a_row = 0
            return
        if not (isinstance(error, RankError) and error.only(OSError)):
            raise error
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self._policy.max_failed_saves:
            raise TooManyFailedSaves(error.failures) from error

    def finish(self) -> None:
        """Wait for the last save and let go of what the writer holds. A collective.

        Raises:
            RankError: if that save failed: a run ends with a checkpoint or does not end well.
        """
        last = self._last
        try:
            self.wait()
        finally:
            self._writer.close()
        if last is not None and (error := last.manifest.exception()) is not None:
            raise error
        if self._memory is not None:  # not before: if that save is lost, copies are what there is
            self._memory.close()

    def newest(self) -> str | None:
        """Name of the newest directory of a save, committed or not. For one rank; looks at the storage."""
        return next((name for *_, name in self._catalog.names()), None)

    def is_older(self, name: str | None) -> bool:
        """Whether a checkpoint was committed after that one, or after the beginning. For one rank."""
        last = self._catalog.last_committed()
        return last is not None and (name is None or Catalog.version(last) > Catalog.version(name))

    def restore_from_memory(self) -> Copy | None:
        """Restore the newest copy in memory, if it is newer than all checkpoints. A collective, at the beginning.

        Returns:
            None if there is no such copy, and then nothing has changed: `load` is to be called.
        """
        if self._memory is None:
            return None
        newest = self._ranks.on_rank_zero(self._catalog.last_committed)
        newer_than = Catalog.version(newest) if newest else None
        return self._memory.restore(self._state, self.info, self._attempt - 1, newer_than)

    def load(self) -> str | None:
        """Restore the newest good checkpoint. A collective.

        A save that is under way is waited for: it may become the newest, and it reads what is about to be overwritten.
        Damage is found on any rank and agreed by all; then the next older one is tried, with a warning.

        Returns:
            The name of what was restored; None if the run has no checkpoint, and then nothing has changed.

        Raises:
            TooManyFailedSaves: on every rank.
            RuntimeError: if there are checkpoints but none is good: starting over would hide the loss.
            OSError: if none of them can be read just now.
            ValueError: if the newest good one is of another model or other data.
        """
        self.wait()
        walk, committed, unreadable = self._catalog.entries(), 0, 0  # rank 0 goes along it, as far as need be

        def step() -> tuple[str, str | None, bool, bool] | None:
            entry = next(walk, None)
            if entry is not None and entry.unreadable:
                time.sleep(reader.AGAIN_S)
                entry = self._catalog.entry(entry.name)
            if entry is None:
                return None
            return entry.name, entry.problem, entry.committed, entry.unreadable

        while (found := self._ranks.on_rank_zero(step)) is not None:
            name, problem, was_committed, cannot_be_read = found
            committed += was_committed
            unreadable += was_committed and cannot_be_read
            if problem is None:
                if self._memory is not None:
                    self._memory.forget()
                problem = reader.damage_on_loading(self._catalog.directory(name), self._state, self._ranks)
                if problem is None:
                    return name
            if self._ranks.rank == 0:
                self._journal.passed_over(name, problem)
        if committed and unreadable == committed:  # storage is away, rather
            raise OSError(errno.EIO, f"none of the {committed} checkpoints of this run can be read now")
        if committed:
            raise RuntimeError(f"none of the {committed} checkpoints of this run can be read; not starting over")
        return None
