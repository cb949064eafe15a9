"""A directory on a local or shared file system."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from areal_ray.storage.base import LeadsOut, NotAFile, Sink


def deny_writing_to_all() -> None:
    """Take the right to write from all users in what this process and its children create from now on.

    Files of a run are as the user's umask has them, but where that is 0, as in some containers, anybody could rewrite
    logs and checkpoints.
    """
    os.umask(os.umask(0o077) | 0o002)  # too strict for a moment, not too open, for other threads


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
    def filesystem(self) -> None:
        return None

    def sub(self, name: str) -> LocalStorage:
        return LocalStorage(self._inside(name))

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._path))
        except FileNotFoundError:
            return []

    def directories(self, prefix: str) -> list[str]:
        try:
            with os.scandir(self._path) as entries:
                return [entry.name for entry in entries if entry.name.startswith(prefix) and _is_directory(entry)]
        except FileNotFoundError:
            return []

    def stamp(self, name: str) -> int | None:
        try:
            return os.stat(f"{self._path}/{name}").st_mtime_ns  # not `_inside`: asked for a thousand at a time
        except OSError:  # none, or one that cannot be looked at: whoever needs it is told so
            return None

    def sizes(self) -> dict[str, int]:
        try:
            with os.scandir(self._path) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if _is_file(entry)}
        except FileNotFoundError:
            return {}

    def size(self, name: str) -> int | None:
        path = self._inside(name)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def make(self) -> None:
        os.mkdir(self._path)
        _sync_directory(os.path.dirname(self._path))

    def ensure(self, private: bool = False) -> None:
        os.makedirs(self._path, exist_ok=True)
        if private:
            os.chmod(self._path, 0o700)

    @contextmanager
    def create(self, name: str) -> Iterator[Sink]:
        path = self._inside(name)
        with open(path, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(os.path.dirname(path))

    @contextmanager
    def create_whole(self, name: str) -> Iterator[Sink]:
        path = self._inside(name)
        temporary = f"{path}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.remove(temporary)
            raise
        _sync_directory(os.path.dirname(path))

    def replace(self, name: str, data: bytes) -> None:
        path = self._inside(name)
        # Process numbers are equal on different machines, and threads share one: a half of each would be renamed.
        temporary = f"{path}.{secrets.randbelow(10**15)}.tmp"
        try:
            with open(temporary, "xb") as file:
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
        path = self._inside(name)
        fd = _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            before, written = os.fstat(fd).st_size, 0
            try:
                written = os.write(fd, data)
                if written != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
                os.fsync(fd)
                if not before:  # new, perhaps: then its name is not durable yet
                    _sync_directory(os.path.dirname(path))
            except OSError:
                # Taken back: whoever tries again writes all of it, and a part would stand twice.
                if os.fstat(fd).st_size == before + written:
                    os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)

    def truncate(self, name: str, size: int) -> None:
        with os.fdopen(_open(self._inside(name), os.O_RDWR), "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())

    def open(self, name: str) -> BinaryIO:
        return os.fdopen(_open(self._inside(name), os.O_RDONLY), "rb")

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        with self.open(name) as file:
            file.seek(offset)
            return file.read(length)

    def read_blocks(self, name: str, size: int) -> Iterator[bytes]:
        with self.open(name) as file:
            while block := file.read(1 << 20):
                yield block

    def remove(self, name: str) -> None:
        path = self._inside(name)
        os.remove(path)
        _sync_directory(os.path.dirname(path))

    def set_aside(self, name: str) -> str:
        aside = f"{name}.aside-{secrets.token_hex(4)}"
        path = os.path.join(self._path, name)  # not `_inside`: a link itself, not what it leads to
        os.rename(path, os.path.join(self._path, aside))
        _sync_directory(os.path.dirname(path))
        return aside

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
            raise LeadsOut(f"{name!r} is not a name inside {self._path}")
        return path


def _open(path: str, flags: int) -> int:
    """Opens a file and nothing else: a FIFO would be waited for, for ever, and a device does as it likes."""
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, 0o644)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EISDIR):  # a FIFO or socket, a directory, opened for writing
            raise NotAFile(error.errno, "not a regular file", path) from None
        raise
    try:
        _regular(os.fstat(fd), path)
    except NotAFile:
        os.close(fd)
        raise
    return fd


def _regular(status: os.stat_result, path: str) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "a FIFO" if stat.S_ISFIFO(status.st_mode) else "there"
        raise NotAFile(errno.EINVAL, f"{what}, but not a regular file", path)
    return status


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a loop, or one that cannot be followed now: whoever opens it says so
        return True


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _sync_directory(path: str) -> None:
    """Make the entries of a directory durable: fsync of a file does not make its name survive a power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
