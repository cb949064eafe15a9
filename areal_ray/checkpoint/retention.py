"""Which checkpoints a run keeps. A policy over a list, and the hand that carries it out."""

from __future__ import annotations

from collections.abc import Sequence

from areal_ray.checkpoint.catalog import Catalog, Entry
from areal_ray.checkpoint.manifest import MANIFEST
from areal_ray.checkpoint.read_lock import has_readers
from areal_ray.config import KeepConfig


def deletable(entries: Sequence[Entry], keep: KeepConfig) -> list[Entry]:
    """Those of the good checkpoints (newest first) that no rule keeps. The newest one is never among them.

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
    """Directories of earlier attempts whose save was never finished: nobody will finish it, nobody may read it."""
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
