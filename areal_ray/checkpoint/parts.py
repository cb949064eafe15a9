"""Reading of parts of tensors: what overlaps a rank's own, in large ranges, each byte verified before it is used."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch

from areal_ray.checkpoint.format.contents import Contents
from areal_ray.checkpoint.format.layout import LAYOUT, Cut
from areal_ray.checkpoint.format.manifest import CheckpointDamaged, reading
from areal_ray.checkpoint.format.sums import Sums
from areal_ray.checkpoint.tree import box_of, is_here, local
from areal_ray.distributed.device import Uploads
from areal_ray.storage import Storage, read_ahead

_BLOCK = 8 << 20  # bytes of one part that are read at a time
_REQUEST = 16 << 20  # bytes of neighbouring parts that are read in one piece: on object storage every read is a request
_GAP = 64 << 10  # bytes that are read in vain rather than with a request more
_IN_FLIGHT = 8


@dataclass(frozen=True)
class _Overlap:
    """What a part has of the tensor that is to be filled.

    Args:
        row: of the part, in its file.
        shape: of the part.
        box: of it, offset and length in each dimension.
        target: the place for the box.
    """

    row: int
    shape: tuple[int, ...]
    box: list[tuple[int, int]]
    target: torch.Tensor


@dataclass(frozen=True)
class _Block:
    """Rows of a part, and where they lie in the file.

    Args:
        overlap: with only these rows.
        start, end: bytes of the file that are to be read and verified for it.
        data: where in the file the rows begin; None in format 1, which does not say.
    """

    overlap: _Overlap
    start: int
    end: int
    data: int | None


def read_tensors(
    directory: Storage,
    contents: Contents,
    tensors: Mapping[str, torch.Tensor],
    one_by_one: bool = False,
    offsets: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Fill tensors in place. No collective.

    Beyond the tensors it takes some 128 MB at most, and one row of a tensor where that is larger.

    Args:
        directory: of the checkpoint.
        contents: of the checkpoint; they have tensors of these names, shapes and types.
        tensors: plain ones and DTensors, whose parts here are filled.
        one_by_one: read one range after the other, where several threads do this.
        offsets: where in the stored ones these tensors begin, where that is not what a DTensor says of itself.

    Raises:
        CheckpointDamaged: if something that is needed is missing or damaged.
    """
    wanted = _overlaps(contents, tensors, offsets or {})
    sums = contents.sums(directory, wanted)
    reads = (
        (end - start, partial(_read, directory, contents.files[number], sums[number], start, end, blocks))
        for number, overlaps in sorted(wanted.items())
        for start, end, blocks in _requests(list(_blocks(overlaps, sums[number])))
    )
    uploads = Uploads()
    for read in read_ahead(reads, in_flight=1) if one_by_one else read_ahead(reads, _IN_FLIGHT):
        for target, source in read:
            uploads.copy(target, source)
    uploads.wait()


def _overlaps(
    contents: Contents, tensors: Mapping[str, torch.Tensor], offsets: Mapping[str, tuple[int, ...]]
) -> dict[int, list[_Overlap]]:
    """By the number of the shard file. Tensors that are cut alike there and here are looked up once."""
    found: dict[int, list[_Overlap]] = {}
    known: dict[Any, list[int]] = {}
    for name, tensor in tensors.items():
        if not is_here(tensor):
            continue
        cut, rows = contents.layout.tensors[name].cut, contents.layout.rows[name]
        offset, length = (offsets[name], tuple(tensor.shape)) if name in offsets else box_of(tensor)
        key = id(cut), offset, length
        if key not in known:
            known[key] = cut.overlapping(offset, length).tolist()
        for part in known[key]:
            overlap = _overlap(cut, part, int(rows[part]), offset, length, local(tensor).detach())
            found.setdefault(int(cut.shards[part]), []).append(overlap)
    return found


def _overlap(
    cut: Cut, part: int, row: int, offset: tuple[int, ...], length: tuple[int, ...], target: torch.Tensor
) -> _Overlap:
    shape, box = cut.lengths[part].tolist(), []
    for dim, first in enumerate(cut.offsets[part].tolist()):
        start, end = max(first, offset[dim]), min(first + shape[dim], offset[dim] + length[dim])
        target = target.narrow(dim, start - offset[dim], end - start)
        box.append((start - first, end - start))
    return _Overlap(row, tuple(shape), box, target)


def _blocks(overlaps: Iterable[_Overlap], sums: Sums) -> Iterator[_Block]:
    """Overlaps in pieces of some rows each: contiguous ranges of the file."""
    for overlap in overlaps:
        row, size = overlap.row, overlap.target.element_size()
        if sums.data is None:
            yield _Block(overlap, *sums.span(row, 0, 1), None)
            continue
        before, offset = int(sums.data[row]), int(sums.offsets[row])
        if before + prod(overlap.shape) * size > int(sums.sizes[row]):
            raise CheckpointDamaged(f"{LAYOUT}: a part of shape {overlap.shape} is larger than what is stored of it")
        first, count = overlap.box[0] if overlap.box else (0, 1)
        row_bytes = prod(overlap.shape[1:]) * size
        step = max(1, _BLOCK // row_bytes)
        for at in range(0, count, step):
            some = min(step, count - at)
            start = before + (first + at) * row_bytes
            target = overlap.target.narrow(0, at, some) if overlap.box else overlap.target
            box = [(0, some), *overlap.box[1:]] if overlap.box else []
            shape = (some, *overlap.shape[1:]) if overlap.box else ()
            span = sums.span(row, start, start + some * row_bytes)
            yield _Block(_Overlap(row, shape, box, target), *span, offset + start)


def _requests(blocks: list[_Block]) -> Iterator[tuple[int, int, list[_Block]]]:
    """Start, end and blocks of ranges of a file that are read in one piece."""
    blocks.sort(key=lambda block: block.start)
    together: list[_Block] = []
    start = end = 0
    for block in blocks:
        if together and (block.start > end + _GAP or max(end, block.end) - start > _REQUEST):
            yield start, end, together
            together = []
        if not together:
            start = end = block.start
        together.append(block)
        end = max(end, block.end)
    if together:
        yield start, end, together


def _read(
    directory: Storage, name: str, sums: Sums, start: int, end: int, blocks: list[_Block]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Targets, and verified tensors for them."""
    with reading(name):
        data = bytearray(directory.read_range(name, start, end - start))  # writable, as torch wants it
    if len(data) != end - start:
        raise CheckpointDamaged(f"{name}: ends after {start + len(data)} bytes, should have {end}")
    view, pairs = memoryview(data), []
    for block in blocks:
        part, overlap = view[block.start - start : block.end - start], block.overlap
        sums.verify(overlap.row, block.start, part, name)
        dtype, target = overlap.target.dtype, overlap.target
        if block.data is None:
            tensor = _decode(part, name, block.start, overlap.shape, dtype)
        else:
            at = block.data - start
            tensor = torch.frombuffer(data, dtype=dtype, count=prod(overlap.shape), offset=at).view(overlap.shape)
        for dim, (first, length) in enumerate(overlap.box):
            tensor = tensor.narrow(dim, first, length)
        pairs.append((target, tensor))
    return pairs


def _decode(data: memoryview, name: str, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor as torch.save wrote it."""
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:  # of this machine
        raise
    except Exception as error:  # noqa: BLE001  (written so, or the checksum would not match; torch raises almost anything)
        raise CheckpointDamaged(f"{name}: the bytes at {at} are no tensor ({type(error).__name__})") from None
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise CheckpointDamaged(f"{name}: the bytes at {at} are no {dtype} of shape {shape}")
    return tensor
