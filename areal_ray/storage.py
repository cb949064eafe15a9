"""Where runs live: a small interface over a directory tree, made for state that must survive a crash.

Everything that is written is durable when the call returns, and nothing is ever changed in place: a file is created
whole, replaced whole, or (logs) appended to. Floor 0: checkpoints, run directory and tools use it without Ray.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Protocol


class Sink(Protocol):
    """A file that is being written."""

    def write(self, data: bytes | memoryview, /) -> int: ...


class Storage(Protocol):
    """A directory. Names are relative to it, with `/` between their parts; one that leads out raises ValueError."""

    @property
    def location(self) -> str:
        """The absolute path or URI of this directory, as a user would type it."""
        ...

    @property
    def recipe(self) -> dict[str, Any]:
        """Arguments of `storage_at` that open it in another process; may hold credentials, so never to be shown."""
        ...

    @property
    def can_append(self) -> bool:
        """Whether `append` is there; object storage has none."""
        ...

    def sub(self, name: str) -> Storage:
        """The directory `name` below this one, whether it exists or not."""
        ...

    def names(self) -> list[str]:
        """What is directly in here, sorted; empty if there is no such directory."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of every file directly in here, by name, with one look."""
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
    def create(self, name: str) -> Iterator[Sink]:
        """A new file to write to, which must not exist yet (FileExistsError); durable once the block is left."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write the small file `name` so that a reader sees either all of the old bytes or all of the new ones."""
        ...

    def publish(self, name: str, data: bytes) -> None:
        """Write the small file `name` in one piece; if somebody else has (FileExistsError), theirs stays."""
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

    can_append = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Resolved once: Ray compares paths by prefix, and a symlink would pass one of its checks and fail another.
        self._path = os.path.realpath(os.path.expanduser(path))

    @property
    def location(self) -> str:
        return self._path

    @property
    def recipe(self) -> dict[str, Any]:
        return {"path": self._path}

    def sub(self, name: str) -> LocalStorage:
        return LocalStorage(self._inside(name))

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._path))
        except FileNotFoundError:
            return []

    def sizes(self) -> dict[str, int]:
        try:
            with os.scandir(self._path) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}

    def size(self, name: str) -> int | None:
        path = self._inside(name)
        return os.path.getsize(path) if os.path.isfile(path) else None

    def make(self) -> None:
        os.mkdir(self._path)
        _sync_directory(os.path.dirname(self._path))

    def ensure(self) -> None:
        os.makedirs(self._path, exist_ok=True)

    @contextmanager
    def create(self, name: str) -> Iterator[Sink]:
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

    def publish(self, name: str, data: bytes) -> None:
        # Made by one writer alone, see `make`: between them a check is enough, and not every file system has links.
        if os.path.lexists(self._inside(name)):
            raise FileExistsError(f"{self._inside(name)} exists")
        self.replace(name, data)

    def append(self, name: str, data: bytes) -> None:
        # One write on a descriptor opened for appending: lines of several writers on one machine do not mix.
        fd = os.open(self._inside(name), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            before, written = os.fstat(fd).st_size, 0
            try:
                written = os.write(fd, data)
                if written != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._inside(name))
                os.fsync(fd)
            except OSError:
                # Taken back: whoever tries again writes all of it, and a part would stand twice.
                if os.fstat(fd).st_size == before + written:
                    os.ftruncate(fd, before)
                raise
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


def storage_at(path: str, s3: Mapping[str, str | None] | None = None) -> Storage:
    """The storage that a user's path names.

    Args:
        path: of a directory, or s3://bucket/prefix.
        s3: endpoint, region and credentials for the latter, see `S3Storage`.

    Raises:
        ValueError: for a scheme that is not supported, or if its library is missing.
    """
    scheme, separator, _ = path.partition("://")
    if not separator:
        return LocalStorage(path)
    if scheme != "s3":
        raise ValueError(f"{scheme}:// is not supported: it must be a path that every node sees, or s3://bucket/prefix")
    try:
        from areal_ray.storage_s3 import S3Storage

        return S3Storage(path, s3)
    except ModuleNotFoundError as error:
        raise ValueError(f"s3:// needs packages that are not installed ({error.name}): areal_ray[s3]") from None
