"""Ranges of bytes of many files: read in place from a disk, through a bounded cache from object storage."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import BinaryIO, Protocol

from areal_ray.storage import LocalStorage, Storage

_OPEN_FILES = 64
_BLOCK = 1 << 16  # about what a request costs whatever its size
_LARGE_BLOCK = 1 << 20  # where all of it will be wanted
_CACHED = 64 << 20
_IN_FLIGHT = 16
Range = tuple[str, int, int]  # name, offset, length


class Ranges(Protocol):
    def read(self, wanted: Sequence[Range]) -> list[bytes]:
        """The bytes of every range, in order.

        Raises:
            OSError: if one cannot be read, or its file ends before it does.
        """
        ...


class LocalRanges:
    """Ranges of files on a disk. Nothing is cached here: the kernel does it, for all ranks of a node together.

    Read, not mapped: pages of a map count as a rank's memory, and a file that is cut off under one kills the rank.

    Args:
        storage: with the files.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        # Not closed but let go of: another thread may be reading from it.
        self._open = lru_cache(_OPEN_FILES)(storage.open)

    def read(self, wanted: Sequence[Range]) -> list[bytes]:
        return [self._one(*each) for each in wanted]

    def _one(self, name: str, offset: int, length: int) -> bytes:
        file: BinaryIO = self._open(name)
        found = os.pread(file.fileno(), length, offset)
        while len(found) < length:  # a read may be cut short by a signal, or at 2 GiB
            more = os.pread(file.fileno(), length - len(found), offset + len(found))
            if not more:
                raise _too_short(self._storage, name, offset + length)
            found += more
        return found


class RemoteRanges:
    """Ranges of objects, by blocks, several requests at a time, with a cache of 64 MiB.

    A corpus that fits into the cache is soon in it whole, and is read in blocks of 1 MiB: requests take the processor,
    which is the training's, too. Of a larger one rows at random hardly hit the cache, and are read in blocks of 64 KiB;
    what hides the time of a request is reading ahead.

    Args:
        storage: with the objects.
        size: bytes of them all.
    """

    def __init__(self, storage: Storage, size: int) -> None:
        self._storage, self._block = storage, _LARGE_BLOCK if size <= _CACHED else _BLOCK
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._held = 0  # bytes of them
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="corpus")

    def read(self, wanted: Sequence[Range]) -> list[bytes]:
        needed = {
            (name, block): None
            for name, offset, length in wanted
            for block in range(offset // self._block, -(-(offset + length) // self._block))
        }
        blocks = {key: self._blocks[key] for key in needed if key in self._blocks}
        missing = [key for key in needed if key not in blocks]
        blocks |= zip(missing, self._pool.map(self._fetch, missing), strict=True)
        self._held += sum(len(blocks[key]) for key in missing)
        for key, data in blocks.items():
            self._blocks[key] = data
            self._blocks.move_to_end(key)
        while self._held > _CACHED:
            _, data = self._blocks.popitem(last=False)
            self._held -= len(data)
        return [self._cut(blocks, *each) for each in wanted]

    def _fetch(self, key: tuple[str, int]) -> bytes:
        name, block = key
        return self._storage.read_range(name, block * self._block, self._block)

    def _cut(self, blocks: dict[tuple[str, int], bytes], name: str, offset: int, length: int) -> bytes:
        first = offset // self._block
        data = b"".join(blocks[name, block] for block in range(first, -(-(offset + length) // self._block)))
        found = data[offset - first * self._block :][:length]
        if len(found) < length:
            raise _too_short(self._storage, name, offset + length)
        return found


def _too_short(storage: Storage, name: str, wanted: int) -> OSError:
    return OSError(f"{storage.location}/{name} ends before byte {wanted}: it is not the file that was prepared")


def ranges_of(storage: Storage, size: int) -> Ranges:
    """The ranges of the files in a directory, of so many bytes."""
    return LocalRanges(storage) if isinstance(storage, LocalStorage) else RemoteRanges(storage, size)
