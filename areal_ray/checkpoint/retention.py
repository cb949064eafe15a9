"""Retention of checkpoints: `deletable` decides, Retention carries it out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from areal_ray.checkpoint.catalog import Catalog, Entry, Summary
from areal_ray.checkpoint.format.manifest import MANIFEST, Manifest
from areal_ray.checkpoint.read_lock import has_readers
from areal_ray.config import KeepConfig

E = TypeVar("E", Entry, Summary)
_INDEX_EVERY = 8  # saves: a start reads the manifests of those that are not in the index


class Retention:
    """Deletes checkpoints of a run. What cannot be deleted is in the way of nothing: the next call tries again.

    Args:
        catalog: the run's checkpoints.
        keep: the rules.
        distrusted: names of checkpoints that earlier attempts could not restore, whatever they look like: no rule
            counts them, and they stay (OSError if that is not known now). Asked for once.
        on_deleted: told the name of each checkpoint that `apply` or `clean_up` deletes.
        say: prints a line for the user.
        began: which of these names are of saves that this run has begun; nothing else is cleaned up. Asked for only
            where there is something to clean up.
    """

    def __init__(
        self,
        catalog: Catalog,
        keep: KeepConfig,
        distrusted: Callable[[], Collection[str]],
        on_deleted: Callable[[str], None],
        say: Callable[[str], None],
        began: Callable[[Collection[str]], Collection[str]] = set,
    ) -> None:
        self._catalog, self._keep, self._began = catalog, keep, began
        self._distrusted, self._on_deleted, self._say = distrusted, on_deleted, say
        self._passed_over, self._distrusted_read = set[str](), False
        self._known: dict[str, Summary] | None = None  # newest first; None: not looked at
        self._not_indexed = 0

    def committed(self, name: str, manifest: Manifest) -> None:
        """Take note of a save that was committed, and `apply` the rules."""
        try:
            known = self._load()
            if name not in known:
                self._known = {name: self._catalog.committed(name, manifest), **known}
                self._not_indexed += 1
            if self._not_indexed >= _INDEX_EVERY:
                self._write_index()
        except OSError as error:
            self._say(f"could not write down which checkpoints there are: {error}")
        self.apply()

    def distrust(self, name: str) -> None:
        """Take note of a checkpoint that could not be restored."""
        self._passed_over.add(name)

    def apply(self) -> None:
        """Delete the checkpoints that no rule keeps; to be called when a save is committed.

        What is there is looked at once; from then on this object knows, as it makes and deletes all checkpoints.
        """
        if self._keep.last is None:
            return
        try:
            if not self._distrusted_read:
                self._passed_over |= set(self._distrusted())
                self._distrusted_read = True
            gone = [each.name for each in self._gone(self._load())]
            if gone:
                # First, so that it never has one whose deletion was begun: on object storage that is not seen.
                self._write_index(without=gone)
        except OSError as error:
            self._say(f"could not look for checkpoints to delete: {error}")
            return
        known = self._load()
        for name in self._delete(gone):
            del known[name]

    def clean_up(self, before_attempt: int) -> None:
        """Delete what saves of earlier attempts have left unfinished, and say it.

        What this run has not begun, or holds files that no save writes, was not left by one: it stays, and that is
        said.
        """
        found = self._catalog.uncommitted(before_attempt)
        likely = [name for name, own in found.items() if own]
        begun = self._began(likely) if likely else ()
        if deleted := self._delete([name for name in likely if name in begun]):
            self._say(f"cleaned up saves of earlier attempts that were never finished: {_some(deleted)}")
        if foreign := [name for name, own in found.items() if not own]:
            self._say(f"left as it is, without a manifest and with files that no save writes: {_some(foreign)}")
        if others := [name for name in likely if name not in begun]:
            self._say(f"left as it is, without a manifest and begun by no save of this run: {_some(others)}")

    def discard(self, name: str) -> None:
        """Delete what a failed save has left, which may be what fills the disk.

        If a rank died after the commit, it is a checkpoint and stays; so does what was there before and made it fail.
        """
        try:
            own = not self._catalog.is_committed(name) and self._catalog.is_of_a_save(name)
        except OSError:  # not known; what is left is cleaned up by a later attempt
            return
        if own:
            self._remove(name)

    def _load(self) -> dict[str, Summary]:
        """The checkpoints by name, newest first. Without rules not all that the index lacks, which may be many of an
        older version's run: every start adds some."""
        if self._known is None:
            found = self._catalog.summaries(at_most=2 * _INDEX_EVERY if self._keep.last is None else None)
            self._known = {each.name: each for each in found}
            self._not_indexed = sum(each.problem is None and not each.indexed for each in found)
        return self._known

    def _gone(self, known: dict[str, Summary]) -> list[Summary]:
        """The checkpoints that no rule keeps. Those that are counted in their place are looked at: the index, or what
        was known, may be wrong about them."""
        found = {name: each for name, each in known.items() if name not in self._passed_over}
        looked_at: set[str] = set()
        while gone := deletable(list(found.values()), self._keep):
            counted = {each.name for each in _counted(list(found.values()), self._keep)} - looked_at
            if not counted:
                break
            for name in counted:
                found[name] = known[name] = self._catalog.look(name)
            looked_at |= counted
        return gone

    def _write_index(self, without: Collection[str] = ()) -> None:
        self._catalog.write_index(each for name, each in self._load().items() if name not in without)
        self._not_indexed = 0

    def _delete(self, names: Sequence[str]) -> list[str]:
        """The names of those that are gone, by this or by somebody else."""
        gone = []
        for name in names:
            removed = self._remove(name)
            if removed:
                self._on_deleted(name)
            if removed is not False:
                gone.append(name)
        return gone

    def _remove(self, name: str) -> bool | None:
        """Whether it was deleted; None if it had gone before."""
        try:
            return remove(self._catalog, name)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._say(f"could not delete {name}: {error}")
            return False


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def deletable(entries: Sequence[E], keep: KeepConfig) -> list[E]:
    """The good checkpoints among `entries` (newest first) that no rule keeps. The newest good one is never among them.

    What is not good is not counted, so damage does not push good ones out.
    """
    if keep.last is None:
        return []
    kept = {entry.name for entry in _counted(entries, keep)}
    every = keep.every_steps
    return [
        entry
        for entry in entries
        if entry.problem is None and entry.name not in kept and not (every and entry.step % every == 0)
    ]


def _counted(entries: Sequence[E], keep: KeepConfig) -> list[E]:
    """The good checkpoints that are kept because they are among so many: one that is no good would cost another."""
    assert keep.last is not None
    good = [entry for entry in entries if entry.problem is None]
    last = good[: max(1, keep.last)]
    if not keep.best:
        return last
    sign = 1 if keep.mode == "min" else -1
    scored = [(sign * value, -entry.step, entry) for entry in good if (value := _metric(entry, keep)) is not None]
    return last + [entry for *_, entry in sorted(scored, key=lambda item: item[:2])[: keep.best]]


def remove(catalog: Catalog, name: str) -> bool:
    """Delete a checkpoint; its manifest first, so that what a crash leaves behind is no checkpoint.

    Returns:
        False if it stays because somebody is reading it.

    Raises:
        OSError: if it cannot be deleted.
    """
    directory = catalog.directory(name)
    if has_readers(directory):
        return False
    if directory.size(MANIFEST) is not None:
        manifest = directory.read(MANIFEST)
        directory.remove(MANIFEST)
        if has_readers(directory):  # began in between, and may have seen the manifest
            directory.publish(MANIFEST, manifest)
            return False
    directory.delete()
    return True


def _metric(entry: Entry | Summary, keep: KeepConfig) -> float | None:
    value = entry.info.get("metrics", {}).get(keep.metric)
    return value if isinstance(value, int | float) and value == value else None
