"""The bytes of one shard file: tensors one after the other, each as `torch.save` writes it.

That is DCP's own file format (torch.distributed.checkpoint.filesystem), so that plain `dcp.load` reads it.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from areal_ray.checkpoint.manifest import FileRecord
from areal_ray.processes.file_writer import Buffer, write_summed
from areal_ray.storage import Storage


@lru_cache(maxsize=4096)
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """The bytes before and after the data of a contiguous tensor."""
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        buffer = io.BytesIO()
        torch.save(torch.zeros(shape, dtype=dtype), buffer)
    finally:
        torch.serialization.set_crc32_options(checked)
    blob = buffer.getvalue()
    with zipfile.ZipFile(buffer) as archive:
        record = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
    # A zip entry's data follow its local header: 30 bytes, then a name and extra fields of these lengths.
    name, extra = struct.unpack_from("<HH", blob, record.header_offset + 26)
    start = record.header_offset + 30 + name + extra
    return blob[:start], blob[start + record.file_size :]


def write_shard(
    directory: Storage, name: str, items: Iterable[tuple[MetadataIndex, torch.Tensor]]
) -> tuple[dict[MetadataIndex, _StorageInfo], FileRecord]:
    """Write tensors to a new file, one after the other, without a copy of the whole.

    Args:
        directory: an existing directory.
        name: of a file that does not exist yet.
        items: what DCP calls each tensor, and the tensor.

    Returns:
        Where each one lies, and the record of the file.
    """
    indices: list[MetadataIndex] = []

    def chunks() -> Iterator[Sequence[Buffer]]:
        for index, tensor in items:
            indices.append(index)
            before, after = frame(tuple(tensor.shape), tensor.dtype)
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            yield [before, data.data, after]

    record = FileRecord(**write_summed(directory, name, chunks()))
    places = (_StorageInfo(name, offset, length) for offset, length, _ in record.chunks)
    return dict(zip(indices, places, strict=True)), record


def write_small(directory: Storage, name: str, data: bytes) -> FileRecord:
    """Write a small file that must not exist yet."""
    with directory.create(name) as file:
        file.write(data)
    return FileRecord(len(data), xxhash.xxh3_128_hexdigest(data))
