"""Storage: a small interface over a directory tree, made for state that must survive a crash.

Everything that is written is durable when the call returns, and nothing is ever changed in place: a file is created
whole, replaced whole, or (logs) appended to.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol

_OF_A_FILE = {errno.EIO, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EBADMSG, errno.EUCLEAN}


class NotAFile(OSError):
    """A directory, a FIFO, a socket or a device, where a file should be; it is not touched."""


class LeadsOut(OSError, ValueError):
    """A name that leads out of its directory, by itself or by a link."""


def is_unreadable(error: OSError) -> bool:
    """Whether an error is about a file that cannot be read, and need not be about the others beside it.

    Where all of them give one, as on a mount that is away, it is the storage: see `RecoverHandler.load`.
    """
    kinds = (NotAFile, LeadsOut, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, kinds) or error.errno in _OF_A_FILE


class Sink(Protocol):
    """A file that is being written."""

    def write(self, data: bytes | memoryview, /) -> int: ...


class Storage(Protocol):
    """A directory. Names are relative to it, with `/` between their parts; one that leads out raises LeadsOut, which is
    a ValueError, too. Nothing but a file is opened as one: anything else raises NotAFile, and nothing waits for it.

    It can be pickled, to be opened in another process; the pickle may hold credentials, and is never to be shown.
    """

    @property
    def location(self) -> str:
        """The absolute path or URI of this directory, as a user would type it."""
        ...

    @property
    def filesystem(self) -> Any:
        """The pyarrow filesystem for Ray Train; None where a path is enough."""
        ...

    @property
    def can_append(self) -> bool:
        """Whether `append` is there; object storage has none."""
        ...

    def sub(self, name: str) -> Storage:
        """The directory `name` below this one, whether it exists or not."""
        ...

    def names(self) -> list[str]:
        """Names of the entries directly in here, sorted; empty if there is no such directory."""
        ...

    def directories(self, prefix: str) -> list[str]:
        """Names of the directories directly in here that begin with `prefix`; empty if there is no such directory.

        One look; on object storage a request for every thousand of them.
        """
        ...

    def stamp(self, name: str) -> int | None:
        """A number for the directory `name` that changes when a file is added to it, removed or replaced.

        None if there is no such directory, and always on object storage, which does not say. Costs no listing.
        """
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of every file directly in here, by name, with one look; links that lead nowhere are none."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of the file `name`; None if there is no such file (OSError if that is not known)."""
        ...

    def make(self) -> None:
        """Create this directory, which must not exist yet (FileExistsError): every save has its own."""
        ...

    def ensure(self, private: bool = False) -> None:
        """Create this directory unless it exists.

        Args:
            private: also close it to other users; object storage has no such thing.
        """
        ...

    @contextmanager
    def create(self, name: str) -> Iterator[Sink]:
        """A new file to write to, which must not exist yet (FileExistsError); durable once the block is left."""
        ...

    @contextmanager
    def create_whole(self, name: str) -> Iterator[Sink]:
        """A file to write to that appears under its name, durably, once the block is left; what was there is replaced.

        Several may write the same name at a time: the last one that is done stays. If the block fails nothing changes.
        """
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write the small file `name` so that a reader sees either all of the old bytes or all of the new ones."""
        ...

    def publish(self, name: str, data: bytes) -> None:
        """Write the small file `name` in one piece; a file that exists stays (FileExistsError)."""
        ...

    def append(self, name: str, data: bytes) -> None:
        """Add `data` to the end of `name` in one piece, creating it when needed."""
        ...

    def truncate(self, name: str, size: int) -> None:
        """Cut `name` off after `size` bytes, durably; where `append` is there."""
        ...

    def open(self, name: str) -> BinaryIO:
        """The file `name` for reading, seekable (FileNotFoundError)."""
        ...

    def read(self, name: str) -> bytes:
        """All bytes of `name` (FileNotFoundError)."""
        ...

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """At most `length` bytes of `name` from `offset` on, in one request (FileNotFoundError); fewer at its end.

        May be called by several threads at a time.
        """
        ...

    def read_blocks(self, name: str, size: int) -> Iterator[bytes]:
        """The `size` bytes of `name`, in order (FileNotFoundError); on object storage several requests at a time."""
        ...

    def remove(self, name: str) -> None:
        """Remove the file `name` (FileNotFoundError), durably."""
        ...

    def set_aside(self, name: str) -> str:
        """Give `name`, whatever it is, another name that nobody uses (OSError); where `append` is there.

        Returns:
            The new name.
        """
        ...

    def delete(self) -> None:
        """Remove this directory with everything in it."""
        ...
