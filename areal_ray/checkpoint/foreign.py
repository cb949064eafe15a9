"""Directories that others wrote with torch's `dcp.save`: their tensors, read in parts, without running a pickle.

Such a directory has `.metadata`, a pickle, and files of items as `torch.save` writes them. It has no checksums: what is
read is only as good as the file system.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from areal_ray.checkpoint.format.format_1 import unpickle_metadata
from areal_ray.checkpoint.format.layout import Cut, Ints, Layout, StoredTensor
from areal_ray.checkpoint.format.manifest import METADATA, CheckpointDamaged, reading
from areal_ray.checkpoint.format.torch_item import NoTensor, TorchItem, find_tensor
from areal_ray.distributed import Ranks
from areal_ray.storage import Storage, read_ahead

_SMALL = 64 << 10  # bytes of an item that is read in one piece: on object storage every read is a request
_BLOCK = 8 << 20  # bytes of rows that are read at a time
_MOST_BYTES = 4 << 30  # of `.metadata`


@dataclass(frozen=True)
class ForeignLayout:
    """What such a directory has, in arrays: with N parts of each of T tensors it has N x T parts.

    Args:
        layout: names, shapes, types and parts of the tensors.
        files: names of the files by their numbers in the layout.
        places: offset and length in its file, of each part (parts, 2), by the name of the tensor.
        objects: names of what is no tensor; it is pickled, and never read.
    """

    layout: Layout
    files: list[str]
    places: dict[str, Ints]
    objects: list[str]

    @classmethod
    def read(cls, directory: Storage) -> ForeignLayout:
        """The layout of a directory. Takes some microseconds and KB for each part, of optimizer and weights.

        Raises:
            CheckpointDamaged: if `.metadata` is missing, is no such thing, or asks for code that has no place in it.
        """
        with reading(METADATA):
            size = directory.size(METADATA)
            if size is not None and size > _MOST_BYTES:
                raise CheckpointDamaged(f"{METADATA}: of {size} bytes")
            data = directory.read(METADATA)
        try:
            return cls._of(unpickle_metadata(data))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointDamaged(f"{METADATA}: not readable ({type(error).__name__}: {error})") from None

    @classmethod
    def _of(cls, metadata: Metadata) -> ForeignLayout:
        numbers: dict[str, int] = {}
        cuts: dict[Any, Cut] = {}
        tensors, places, objects = dict[str, StoredTensor](), dict[str, Ints](), list[str]()
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                objects.append(str(name))
                continue
            chunks = [chunk for chunk in entry.chunks if all(chunk.sizes)]
            where = [metadata.storage_data[MetadataIndex(name, chunk.offsets)] for chunk in chunks]
            if any(getattr(each, "transform_descriptors", None) for each in where):
                raise CheckpointDamaged(f"{METADATA}: {name!r} is compressed or otherwise transformed")
            if outside := [each.relative_path for each in where if not _is_inside(each.relative_path)]:
                raise CheckpointDamaged(f"{METADATA}: {outside[0]!r} is no file of it")
            shards = np.array([numbers.setdefault(each.relative_path, len(numbers)) for each in where], np.int64)
            shape = tuple(map(int, entry.size))
            boxes = np.array([[list(chunk.offsets), list(chunk.sizes)] for chunk in chunks], np.int64)
            boxes = boxes.reshape(len(chunks), 2, len(shape))
            key = shape, boxes.tobytes(), shards.tobytes()
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = StoredTensor(shape, dtype, cuts.setdefault(key, Cut(boxes, shards)))
            places[name] = np.array([[each.offset, each.length] for each in where], np.int64).reshape(len(where), 2)
            if (places[name] < 0).any():
                raise CheckpointDamaged(f"{METADATA}: {name!r} is in a place that there is not")
        return cls(Layout(tensors, len(numbers)), list(numbers), places, objects)


class ForeignState:
    """The tensors of a directory that `dcp.save` of others wrote; as `StoredState`, but without checksums.

    For one thread.

    Args:
        directory: with `.metadata`.
        found: its layout.
    """

    def __init__(self, directory: Storage, found: ForeignLayout) -> None:
        self._directory, self._found = directory, found
        self._items: dict[tuple[str, int], TorchItem] = {}
        self._small: tuple[tuple[str, int] | None, bytes] = None, b""  # the last one of these
        self.names = sorted(found.layout.tensors)
        self.objects = found.objects

    @classmethod
    def open(cls, directory: Storage, ranks: Ranks) -> ForeignState:
        """The tensors of a directory, of which rank 0 reads the description. A collective.

        Raises:
            RankError: on every rank, if it cannot be read.
        """
        return cls(directory, ranks.on_rank_zero(lambda: ForeignLayout.read(directory)))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._found.layout.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        found = torch.__dict__.get(self._found.layout.tensors[name].dtype)
        if not isinstance(found, torch.dtype):
            raise CheckpointDamaged(f"{METADATA}: {name!r} is of a type that this torch has not")
        return found

    def part(self, name: str, box: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The values in a box of a tensor: from where to where in each dimension. Whole rows of parts are read.

        Raises:
            CheckpointDamaged: if a file is missing or cut short, or has something else in that place.
        """
        cut, shape = self._found.layout.tensors[name].cut, [end - begin for begin, end in box]
        result = torch.empty(shape, dtype=self.dtype(name))
        for part in cut.overlapping([begin for begin, _ in box], shape).tolist():
            self._fill(result, name, part, box)
        return result

    def _fill(self, result: torch.Tensor, name: str, part: int, box: Sequence[tuple[int, int]]) -> None:
        """Copy what a part has of the box to its place in the result."""
        cut = self._found.layout.tensors[name].cut
        item, target, inside = self._item(name, part), result, list[tuple[int, int]]()
        for dim, (first, length) in enumerate(zip(cut.offsets[part].tolist(), item.shape, strict=True)):
            begin, end = max(first, box[dim][0]), min(first + length, box[dim][1])
            target = target.narrow(dim, begin - box[dim][0], end - begin)
            inside.append((begin - first, end - first))
        for rows, values in read_ahead(self._reads(name, part, item, inside), in_flight=1):
            into = target.narrow(0, rows[0] - inside[0][0], rows[1] - rows[0]) if inside else target
            for dim, (begin, end) in enumerate(inside[1:], start=1):
                values = values.narrow(dim, begin, end - begin)
            into.copy_(values)

    def _reads(
        self, name: str, part: int, item: TorchItem, box: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, Any]]:
        """Reads of some rows of a part each: (begin, end) and their values."""
        if not box:
            yield item.extent, lambda: ((0, 1), self._values(name, part, item, 0, item.extent).view(()))
            return
        row = prod(item.shape[1:]) * item.dtype.itemsize
        if not item.contiguous:  # not what DCP writes
            yield item.extent, partial(self._strided, name, part, item, box[0])
            return
        step = max(1, _BLOCK // max(1, row))
        for begin in range(*box[0], step):
            yield step * row, partial(self._rows, name, part, item, (begin, min(begin + step, box[0][1])))

    def _rows(
        self, name: str, part: int, item: TorchItem, rows: tuple[int, int]
    ) -> tuple[tuple[int, int], torch.Tensor]:
        row = prod(item.shape[1:]) * item.dtype.itemsize
        values = self._values(name, part, item, rows[0] * row, (rows[1] - rows[0]) * row)
        return rows, values.view(rows[1] - rows[0], *item.shape[1:])

    def _strided(
        self, name: str, part: int, item: TorchItem, rows: tuple[int, int]
    ) -> tuple[tuple[int, int], torch.Tensor]:
        whole = self._values(name, part, item, 0, item.extent).as_strided(item.shape, item.stride)
        return rows, whole[rows[0] : rows[1]]

    def _values(self, name: str, part: int, item: TorchItem, start: int, size: int) -> torch.Tensor:
        data = self._read(name, part, item.data + start, size)
        return torch.frombuffer(bytearray(data), dtype=item.dtype)

    def _item(self, name: str, part: int) -> TorchItem:
        if (name, part) not in self._items:
            length, file = int(self._found.places[name][part, 1]), self._file(name, part)
            try:
                item = find_tensor(partial(self._read, name, part), length)
            except NoTensor as error:
                raise CheckpointDamaged(f"{file}: {name!r}: {error}") from None
            expected = tuple(self._found.layout.tensors[name].cut.lengths[part].tolist())
            if item.shape != expected or item.dtype != self.dtype(name):
                raise CheckpointDamaged(f"{file}: {name!r} is {item.dtype} {item.shape} there, not {expected}")
            self._items[name, part] = item
        return self._items[name, part]

    def _read(self, name: str, part: int, start: int, size: int) -> bytes:
        offset, length = self._found.places[name][part].tolist()
        file = self._file(name, part)
        assert 0 <= start <= start + size <= length, (file, start, size, length)
        if length <= _SMALL and (start, size) != (0, length):
            if self._small[0] != (name, part):
                self._small = (name, part), self._read(name, part, 0, length)
            return self._small[1][start : start + size]
        with reading(file):
            data = self._directory.read_range(file, offset + start, size)
        if len(data) != size:
            raise CheckpointDamaged(f"{file}: ends after {offset + start + len(data)} bytes")
        return data

    def _file(self, name: str, part: int) -> str:
        return self._found.files[int(self._found.layout.tensors[name].cut.shards[part])]


def _is_inside(path: Any) -> bool:
    """Whether a path is that of a file in the directory itself, as all that DCP writes."""
    return type(path) is str and "/" not in path and path not in ("", ".", "..")
