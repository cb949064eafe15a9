"""Obstacles: what has the name of a file that is to be written, and cannot be read as one."""

from __future__ import annotations

import time
from collections.abc import Callable

from areal_ray.storage.base import NotAFile, Storage, is_unreadable

_AGAIN_S = 1.0  # some errors pass


def set_obstacle_aside(storage: Storage, name: str, read: Callable[[], object], say: Callable[[str], None]) -> None:
    """Give another name to what cannot be read: a directory, a FIFO, a link that leads out, a file with an error of
    input and output or of another user. Nothing is deleted, and nothing waits. Object storage knows none of these.

    Args:
        storage: the directory.
        name: in it.
        read: reads as much of it as will be needed.
        say: prints a line for the user, if something was in the way.

    Raises:
        OSError: if it cannot be set aside, or the storage is away.
    """
    if not storage.can_append:
        return
    for again in (True, False):
        try:
            read()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if not is_unreadable(error):
                raise
            if not again or isinstance(error, NotAFile):
                aside = storage.set_aside(name)
                what = f"{storage.location}/{name} cannot be read ({error.strerror or error})"
                say(f"{what}: set aside as {aside}, and the run goes on without it")
                return
        time.sleep(_AGAIN_S)
