"""Retention of checkpoints: `deletable` and `uncommitted` decide, Retention carries it out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from areal_ray.checkpoint.catalog import Catalog, Entry
from areal_ray.checkpoint.manifest import MANIFEST
from areal_ray.checkpoint.read_lock import has_readers
from areal_ray.config import KeepConfig


class Retention:
    """Deletes checkpoints of a run. What cannot be deleted is in the way of nothing: the next call tries again.

    Args:
        catalog: the run's checkpoints.
        keep: the rules.
        distrusted: names of checkpoints that could not be restored, whatever they look like: no rule counts them, and
            they stay (OSError if that is not known now).
        on_deleted: told the name of each checkpoint that `apply` or `clean_up` deletes.
        say: prints a line for the user.
    """

    def __init__(
        self,
        catalog: Catalog,
        keep: KeepConfig,
        distrusted: Callable[[], Collection[str]],
        on_deleted: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self._catalog, self._keep = catalog, keep
        self._distrusted, self._on_deleted, self._say = distrusted, on_deleted, say

    def apply(self) -> None:
        """Delete the checkpoints that no rule keeps; to be called when a save is committed."""
        if self._keep.last is None:
            return
        try:
            distrusted = self._distrusted()
            trusted = [entry for entry in self._catalog.entries() if entry.name not in distrusted]
        except OSError as error:
            self._say(f"could not look for checkpoints to delete: {error}")
            return
        self._delete([entry.name for entry in deletable(trusted, self._keep)])

    def clean_up(self, before_attempt: int) -> None:
        """Delete what saves of earlier attempts have left unfinished."""
        self._delete(uncommitted(self._catalog, before_attempt))

    def discard(self, name: str) -> None:
        """Delete what a failed save has left, which may be what fills the disk.

        If a rank died after the commit, it is a checkpoint and stays.
        """
        try:
            committed = self._catalog.directory(name).size(MANIFEST) is not None
        except OSError:  # not known; what is left is cleaned up by a later attempt
            return
        if not committed:
            self._remove(name)

    def _delete(self, names: Sequence[str]) -> None:
        for name in names:
            if self._remove(name):
                self._on_deleted(name)

    def _remove(self, name: str) -> bool:
        try:
            return remove(self._catalog, name)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._say(f"could not delete {name}: {error}")
            return False


def deletable(entries: Sequence[Entry], keep: KeepConfig) -> list[Entry]:
    """The good checkpoints among `entries` (newest first) that no rule keeps. The newest good one is never among them.

    What is not good is not counted, so damage does not push good ones out.
    """
    if keep.last is None:
        return []
    good = [entry for entry in entries if entry.problem is None and entry.manifest is not None]
    kept = {entry.name for entry in good[: max(1, keep.last)]}
    if keep.every_steps:
        kept |= {entry.name for entry in good if entry.step % keep.every_steps == 0}
    if keep.best:
        sign = 1 if keep.mode == "min" else -1
        scored = [
            (sign * value, -entry.step, entry.name) for entry in good if (value := _metric(entry, keep)) is not None
        ]
        kept |= {name for _, _, name in sorted(scored)[: keep.best]}
    return [entry for entry in good if entry.name not in kept]


def uncommitted(catalog: Catalog, before_attempt: int) -> list[str]:
    """Names of directories of earlier attempts whose save was never finished: nobody will finish or may read them."""
    return [
        name
        for attempt, _, name in catalog.names()
        if attempt < before_attempt and catalog.directory(name).size(MANIFEST) is None
    ]


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


def _metric(entry: Entry, keep: KeepConfig) -> float | None:
    assert entry.manifest is not None
    value = entry.manifest.info.get("metrics", {}).get(keep.metric)
    return value if isinstance(value, int | float) and value == value else None
