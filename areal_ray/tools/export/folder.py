"""The exports of a run: a folder of Hugging Face directories, each there as a whole or not at all."""

from __future__ import annotations

import os
import re
from contextlib import suppress

from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage, Storage
from areal_ray.tools.export.directory import Exported, Form, export

FOLDER = "export"  # in the run directory
_NAME = re.compile(r"step-(\d{8,})")
_MAKING = ".making-"  # before the name of one that is not finished; nobody else writes here while the lease is held


def export_name(step: int) -> str:
    return f"step-{step:08d}"


def finished(folder: Storage) -> dict[int, str]:
    """The names of the exports that are complete, by their steps.

    One listing, and a question for each: the config, which is written last, tells on object storage.
    """
    names = {int(match[1]): match[0] for name in folder.directories("step-") if (match := _NAME.fullmatch(name))}
    return {step: name for step, name in sorted(names.items()) if _config_of(folder.sub(name)) is not None}


def _config_of(place: Storage) -> str | None:
    """The file that makes a directory a model, or an adapter; None: it is none yet."""
    return next((file for file in ("config.json", "adapter_config.json") if place.size(file) is not None), None)


def export_into(folder: Storage, checkpoint: Storage, step: int, form: Form, run: RunDir | None = None) -> Exported:
    """Export a checkpoint under its step; what an export that was killed has left is removed, and it is made anew.

    On a file system it appears by a rename; on object storage, which has none, its config is written last.

    Raises:
        ValueError, CheckpointDamaged, OSError: as `export`; then there is none.
    """
    name = export_name(step)
    if not isinstance(folder, LocalStorage):
        with suppress(FileNotFoundError):
            folder.sub(name).delete()
        return export(checkpoint, folder.sub(name), form=form, run=run)
    making = folder.sub(_MAKING + name)
    for left in (making, folder.sub(name)):
        with suppress(FileNotFoundError):
            left.delete()
    done = export(checkpoint, making, form=form, run=run)
    os.rename(making.location, folder.sub(name).location)
    descriptor = os.open(folder.location, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return done


def keep_newest(folder: Storage, keep: int | None) -> list[str]:
    """Delete all exports but so many of the newest; None: none. The names of those that are gone."""
    there = list(finished(folder).values())
    gone = there[: max(0, len(there) - keep)] if keep is not None else []
    for name in gone:
        place = folder.sub(name)
        if (config := _config_of(place)) is not None:
            place.remove(config)  # first: what a kill leaves of it is nobody's model
        place.delete()
    return gone
