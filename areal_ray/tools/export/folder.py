"""The exports of a run: a folder of Hugging Face directories, each there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
from contextlib import suppress

from areal_ray.models import Adapter
from areal_ray.run import RunDir
from areal_ray.run.fence import RunTaken
from areal_ray.storage import LocalStorage, Storage
from areal_ray.tools.export.directory import Exported, Form, export

FOLDER = "export"  # in the run directory
_NAME = re.compile(r"step-(\d{8,})")
# Before the name of one that is not finished, or no more. What follows the name is of one process alone: of two
# drivers, one of which has lost the lease and does not know it yet, neither may write to what the other makes.
_MAKING = ".making-"


def export_name(step: int) -> str:
    return f"step-{step:08d}"


def finished(folder: Storage) -> dict[int, str]:
    """The names of the exports that are complete, by their steps.

    One listing, and a question for each: the config, which is written last, tells on object storage.
    """
    return {step: name for step, name in _all(folder).items() if _config_of(folder.sub(name)) is not None}


def _all(folder: Storage) -> dict[int, str]:
    names = {int(match[1]): match[0] for name in folder.directories("step-") if (match := _NAME.fullmatch(name))}
    return dict(sorted(names.items()))


def _config_of(place: Storage) -> str | None:
    """The file that makes a directory a model, or an adapter; None: it is none yet."""
    return next((file for file in ("config.json", "adapter_config.json") if place.size(file) is not None), None)


def new_token() -> str:
    return secrets.token_hex(4)


def export_into(
    folder: Storage,
    checkpoint: Storage,
    step: int,
    form: Form,
    run: RunDir | None = None,
    adapter: Adapter | None = None,
    token: str | None = None,
) -> Exported:
    """Export a checkpoint under its step; what an export that was killed has left there is removed.

    On a file system it appears by a rename; on object storage, which has none, its config is written last.

    Args:
        folder: of the run's exports.
        checkpoint, step: what is exported.
        form, adapter: as of `export`.
        run: of the checkpoint, as of `export`; one that another job has taken over gets no export.
        token: in the name of what is not finished, see `discard`; default a new one.

    Raises:
        ValueError, CheckpointDamaged, OSError: as `export`; then there is none.
        RunTaken: if the run is another job's by now; then its exports are as they were.
    """
    name = export_name(step)
    check = _nothing if run is None else run.fence.check
    if not isinstance(folder, LocalStorage):
        check()
        with suppress(FileNotFoundError):
            folder.sub(name).delete()
        try:
            return export(checkpoint, folder.sub(name), adapter=adapter, form=form, run=run, before_config=check)
        except BaseException:
            with suppress(OSError, RunTaken):
                check()  # by now it may be another job's
                folder.sub(name).delete()
            raise
    making = _making(folder, name, token or new_token())
    try:
        done = export(checkpoint, making, adapter=adapter, form=form, run=run)
        check()
        _publish(folder, making, name)
    except BaseException:
        with suppress(OSError):
            making.delete()
        raise
    descriptor = os.open(folder.location, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return done


def discard(folder: Storage, step: int, token: str) -> None:
    """Delete what a process that was killed has left of an export (OSError).

    On object storage it stays until `clear`, or until it is made anew: it has no name of its own there.
    """
    if isinstance(folder, LocalStorage):
        with suppress(FileNotFoundError):
            _making(folder, export_name(step), token).delete()


def clear(folder: Storage) -> None:
    """Delete what is left of exports that were not finished, or not quite deleted (OSError).

    For who holds the lease and makes none yet. One listing, and a question for each export.
    """
    whole, failed = finished(folder), list[OSError]()
    halves = [name for step, name in _all(folder).items() if step not in whole]
    for name in [*folder.directories(_MAKING), *halves]:
        try:
            folder.sub(name).delete()
        except FileNotFoundError:
            continue
        except OSError as error:  # the others all the same
            failed.append(error)
    if failed:
        raise failed[0]


def keep_newest(folder: Storage, keep: int | None) -> list[str]:
    """Delete all exports but so many of the newest; None: none. The names of those that are gone."""
    if keep is None:
        return []
    there = list(finished(folder).values())
    gone = there[: max(0, len(there) - keep)]
    for name in gone:
        _take_away(folder, name)
    return gone


def _take_away(folder: Storage, name: str) -> None:
    """Delete an export so that what a kill leaves of it is nobody's model."""
    place = folder.sub(name)
    if isinstance(folder, LocalStorage):
        place = _set_aside(folder, name)
    elif (config := _config_of(place)) is not None:
        place.remove(config)
    place.delete()


def _publish(folder: LocalStorage, making: LocalStorage, name: str) -> None:
    place = folder.sub(name).location
    try:
        os.rename(making.location, place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # perhaps it was taken away: what is there stays
            raise
        before = _set_aside(folder, name)
        os.rename(making.location, place)
        with suppress(OSError):  # then the next driver clears it
            before.delete()


def _set_aside(folder: LocalStorage, name: str) -> LocalStorage:
    """Where an export lies from now on."""
    aside = _making(folder, name, new_token())
    os.rename(folder.sub(name).location, aside.location)
    return aside


def _making(folder: LocalStorage, name: str, token: str) -> LocalStorage:
    return folder.sub(f"{_MAKING}{name}.{token}")


def _nothing() -> None: ...
