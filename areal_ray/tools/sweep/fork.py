"""A run that begins with a checkpoint of another one: how pbt has a trial go on where a better one is."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress

from areal_ray.checkpoint import Catalog
from areal_ray.checkpoint.format.manifest import MANIFEST
from areal_ray.checkpoint.read_lock import read_lock
from areal_ray.storage import Storage

_WAIT_S = 120.0  # for a save of the other run that is being written


def fork(source: Storage, target: Storage, step: int, wait_s: float = _WAIT_S) -> str:
    """Give a new run the newest checkpoint of another one that is not beyond a step.

    Its files are linked, so that this costs neither time nor space, whatever its size, and outlives the other run;
    they are copied where there are no links. The manifest comes last: until then there is no checkpoint.

    Args:
        source: directory of the other run, on a file system.
        target: of the new one, which must not exist yet (FileExistsError).
        step: the latest one to begin after; if all checkpoints are later, the earliest of them is taken.
        wait_s: seconds to wait for a first checkpoint.

    Returns:
        The checkpoint's name, the same in both.

    Raises:
        RuntimeError: if the other run has none.
    """
    deadline = time.monotonic() + wait_s
    while True:
        for name in _candidates(source, step):
            with suppress(FileNotFoundError):  # deleted meanwhile
                _link(source.sub(name), target.sub(name), target.make)
                return name
        if time.monotonic() > deadline:
            raise RuntimeError(f"{source.location} has no checkpoint to go on from")
        time.sleep(0.5)


def _candidates(source: Storage, step: int) -> list[str]:
    """Good checkpoints, the best first: the newest until that step, then the earliest after it."""
    good = [entry for entry in Catalog(source).entries() if entry.problem is None]
    until = [entry.name for entry in good if entry.step <= step]
    return until + [entry.name for entry in sorted(good, key=lambda entry: entry.step) if entry.step > step]


def _link(source: Storage, target: Storage, make_run: Callable[[], None]) -> None:
    with read_lock(source):
        manifest = source.read(MANIFEST)
        make_run()
        target.make()
        for name in source.sizes():
            if name != MANIFEST and not name.startswith(".reading-"):
                _link_file(f"{source.location}/{name}", f"{target.location}/{name}")
        target.replace(MANIFEST, manifest)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
