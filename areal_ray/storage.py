"""Where runs live: a small interface over a directory tree, made for state that must survive a crash.

Everything that is written is durable when the call returns, and nothing is ever changed in place: a file is created
whole, replaced whole, or (logs) appended to. Floor 0: checkpoints, run directory and
tools use it without Ray.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, Protocol


class Storage(Protocol):
    """A directory. Names are relative to it, with `/` between their parts; one that leads out raises ValueError."""

    @property
    def location(self) -> str:
        """The absolute path or URI of this directory, as a user would type it."""
        ...

    def sub(self, name: str) -> Storage:
        """The directory `name` below this one, whether it exists or not."""
        ...

    def names(self) -> list[str]:
        """What is directly in here, sorted; empty if there is no such directory."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of the file `name`; None if there is no such file."""
        ...

    def make(self) -> None:
        """Create this directory, which must not exist yet (FileExistsError): nobody ever writes into another's."""
        ...

    def ensure(self) -> None:
        """Create this directory unless it exists."""
        ...

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A new file to write to, which must not exist yet (FileExistsError); durable once the block is left."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write the small file `name` so that a reader sees either all of the old bytes or all of the new ones."""
        ...

    def append(self, name: str, data: bytes) -> None:
        """Add `data` to the end of `name` in one piece, creating it when needed."""
        ...

    def open(self, name: str) -> BinaryIO:
        """The file `name` for reading, seekable (FileNotFoundError)."""
        ...

    def read(self, name: str) -> bytes:
        """All bytes of `name` (FileNotFoundError)."""
        ...

    def remove(self, name: str) -> None:
        """Remove the file `name` (FileNotFoundError), durably."""
        ...

    def delete(self) -> None:
        """Remove this directory with everything in it."""
        ...


class LocalStorage:
    """A directory on a local or shared (NFS and the like) file system."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Resolved once: Ray compares paths by prefix, and a symlink would pass one of its checks and fail another.
        self._path = os.path.realpath(os.path.expanduser(path))

    @property
    def location(self) -> str:
        return self._path

    def sub(self, name: str) -> LocalStorage:
        return LocalStorage(self._inside(name))

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._path))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int | None:
        path = self._inside(name)
        return os.path.getsize(path) if os.path.isfile(path) else None

    def make(self) -> None:
        os.mkdir(self._path)
        _sync_directory(os.path.dirname(self._path))

    def ensure(self) -> None:
        os.makedirs(self._path, exist_ok=True)

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        path = self._inside(name)
        with open(path, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(os.path.dirname(path))

    def replace(self, name: str, data: bytes) -> None:
        path = self._inside(name)
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with suppress(FileNotFoundError):
                os.remove(temporary)
            raise
        _sync_directory(os.path.dirname(path))

    def append(self, name: str, data: bytes) -> None:
        # One write on a descriptor opened for appending: lines of several writers on one machine do not mix.
        fd = os.open(self._inside(name), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(fd, data)
            if written != len(data):
                raise OSError(f"{self._inside(name)}: wrote {written} of {len(data)} bytes")
            os.fsync(fd)
        finally:
            os.close(fd)

    def open(self, name: str) -> BinaryIO:
        return open(self._inside(name), "rb")

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def remove(self, name: str) -> None:
        path = self._inside(name)
        os.remove(path)
        _sync_directory(os.path.dirname(path))

    def delete(self) -> None:
        shutil.rmtree(self._path)

    def _inside(self, name: str) -> str:
        path = os.path.realpath(os.path.join(self._path, name))
        if (
            not name
            or os.path.isabs(name)
            or os.path.commonpath([path, self._path]) != self._path
            or path == self._path
        ):
            raise ValueError(f"{name!r} is not a name inside {self._path}")
        return path


def _sync_directory(path: str) -> None:
    """Make the entries of a directory durable: fsync of a file does not make its name survive a power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def storage_at(path: str) -> Storage:
    """The storage that a user's path names.

    Raises:
        ValueError: for a scheme that is not supported.
    """
    if "://" in path:
        raise ValueError(f"{path}: only local and shared file systems are supported")
    return LocalStorage(path)
