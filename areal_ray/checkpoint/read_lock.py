"""The read lock of a checkpoint: while a reader holds it, the checkpoint is not deleted."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from areal_ray.storage import NotAFile, Storage

_NAME = re.compile(r"\.reading-[0-9a-f]+")
_SECONDS = 3600.0  # a reader that was killed keeps its checkpoint alive that long


@contextmanager
def read_lock(directory: Storage) -> Iterator[None]:
    """Keeps a checkpoint from being deleted while the block lasts, an hour at most.

    To be entered before the manifest is read: a deletion takes the manifest away first and looks for readers then, so
    one of the two sees the other. Storage that cannot be written to is read without a lock.
    """
    name = f".reading-{secrets.token_hex(4)}"
    try:
        directory.replace(name, json.dumps({"until": time.time() + _SECONDS}).encode())
    except OSError:  # read-only, or gone: then the reading says so
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            directory.remove(name)


def has_readers(directory: Storage) -> bool:
    """Whether a reader holds the lock of this checkpoint."""
    for name in directory.names():
        if _NAME.fullmatch(name):  # not the half of one that a killed reader left
            with suppress(FileNotFoundError, NotAFile, ValueError, KeyError, TypeError):  # just finished, or torn
                if json.loads(directory.read(name))["until"] > time.time():
                    return True
    return False
