"""The bytes of one shard file: tensors one after the other, each as `torch.save` writes it, summed while written.

That is DCP's own file format (torch.distributed.checkpoint.filesystem), so that plain `dcp.load` reads it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any, BinaryIO

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from areal_ray.checkpoint.manifest import FileRecord
from areal_ray.storage import Storage


class _SummingWriter(io.RawIOBase):
    """Passes bytes on and keeps their checksums: of everything, and since the last `cut`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._whole, self._part = xxhash.xxh3_128(), xxhash.xxh3_64()
        self._start = self._position = 0
        self._chunks: list[list[Any]] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._whole.update(view)
        self._part.update(view)
        self._position += len(view)
        return len(view)

    def tell(self) -> int:
        return self._position

    def cut(self) -> tuple[int, int]:
        """End the current part; its (offset, length)."""
        start, length = self._start, self._position - self._start
        self._chunks.append([start, length, self._part.hexdigest()])
        self._part, self._start = xxhash.xxh3_64(), self._position
        return start, length

    def record(self) -> FileRecord:
        return FileRecord(self._position, self._whole.hexdigest(), self._chunks)


def write_shard(
    directory: Storage, name: str, items: Iterable[tuple[MetadataIndex, torch.Tensor]]
) -> tuple[dict[MetadataIndex, _StorageInfo], FileRecord]:
    """Write tensors to a new file.

    Args:
        directory: an existing directory.
        name: of a file that does not exist yet.
        items: what DCP calls each tensor, and a CPU tensor.

    Returns:
        Where each one lies, and the record of the file.
    """
    where: dict[MetadataIndex, _StorageInfo] = {}
    with directory.create(name) as file:
        writer = _SummingWriter(file)
        for index, tensor in items:
            tensor = tensor.detach().cpu()
            if tensor.untyped_storage().size() != tensor.numel() * tensor.itemsize:
                tensor = tensor.clone()  # torch.save writes the whole storage that a view looks into
            torch.save(tensor, writer)  # type: ignore[arg-type]
            offset, length = writer.cut()
            where[index] = _StorageInfo(name, offset, length)
    return where, writer.record()


def write_small(directory: Storage, name: str, data: bytes) -> FileRecord:
    """Write a small file that must not exist yet."""
    with directory.create(name) as file:
        file.write(data)
    return FileRecord(len(data), xxhash.xxh3_128_hexdigest(data))
