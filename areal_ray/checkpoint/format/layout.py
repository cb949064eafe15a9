"""layout.json: which part of which tensor lies in which shard file.

A part is a box of a tensor: an offset and a length in each dimension. Ranks cut most tensors in one of a few ways, and
tensors that are cut alike share a `Cut`: with N ranks and T tensors a layout has N x T parts, but the file and what it
takes in memory grow with T + N x the number of ways. `.metadata`, DCP's own, has an entry for each part; it is written
for others, and not read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from areal_ray.checkpoint.format.manifest import CheckpointDamaged, parse_json

LAYOUT = "layout.json"
_FORMAT = 1
_BLOCK = 256  # boxes that are compared with all others at a time
_MOST_DIMS, _MOST_SHARDS, _MOST_PARTS = 32, 2**20, 2**16
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cut:
    """A way in which tensors of one shape are cut into parts.

    Args:
        boxes: (parts, 2, dimensions): offset and length.
        shards: (parts,): number of the file.
    """

    boxes: Ints
    shards: Ints

    @property
    def offsets(self) -> Ints:
        return self.boxes[:, 0]

    @property
    def lengths(self) -> Ints:
        return self.boxes[:, 1]

    def overlapping(self, offset: Sequence[int], length: Sequence[int]) -> Ints:
        """Numbers of the parts that have something of this box."""
        if not len(self.shards):
            return self.shards
        start, end = np.asarray(offset, np.int64), np.asarray(offset, np.int64) + np.asarray(length, np.int64)
        meets = (np.maximum(self.offsets, start) < np.minimum(self.offsets + self.lengths, end)).all(axis=1)
        return np.flatnonzero(meets)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it was saved: its shape, the name of its type in torch, how it is cut."""

    shape: tuple[int, ...]
    dtype: str
    cut: Cut


class Layout:
    """The places of all parts of all tensors.

    Each shard file holds its parts in the order of the tensors here: `rows` are their numbers in it.

    Args:
        tensors: by name, in that order.
        shards: number of shard files; a number that no part has is of a rank that writes none.

    Raises:
        ValueError: if the parts of a tensor are not exactly the tensor: one is missing, stands out or overlaps another.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], shards: int) -> None:
        self.tensors, self.shards = dict(tensors), shards
        checked: set[tuple[tuple[int, ...], int]] = set()
        for name, tensor in self.tensors.items():
            if (key := (tensor.shape, id(tensor.cut))) not in checked:
                if problem := _problem(tensor.shape, tensor.cut, shards):
                    raise ValueError(f"{name!r}: {problem}")
                checked.add(key)

    @property
    def rows(self) -> dict[str, Ints]:
        """The number of each part among those of its shard file."""
        return self._numbered[0]

    @property
    def counts(self) -> Ints:
        """(shards,): the number of parts in each shard file."""
        return self._numbered[1]

    @cached_property
    def _numbered(self) -> tuple[dict[str, Ints], Ints]:
        rows, used = {}, np.zeros(self.shards, np.int64)
        for name, tensor in self.tensors.items():
            shards = tensor.cut.shards
            if len(shards) == 1 or (np.diff(shards) > 0).all():
                rows[name] = used[shards]
                used[shards] += 1
            else:  # a file with several parts of one tensor, or files in another order
                order = np.argsort(shards, kind="stable")
                first = np.searchsorted(shards[order], shards[order])
                rows[name] = np.empty_like(shards)
                rows[name][order] = used[shards[order]] + np.arange(len(shards)) - first
                np.add.at(used, shards, 1)
        return rows, used

    def encode(self) -> bytes:
        cuts: dict[int, int] = {}
        texts: list[str] = []
        for tensor in self.tensors.values():
            cut = tensor.cut
            if id(cut) not in cuts:
                cuts[id(cut)] = len(texts)
                columns = {"shards": cut.shards, "offsets": cut.offsets, "lengths": cut.lengths}
                texts.append(json.dumps({key: column.tolist() for key, column in columns.items()}))
        rows = [json.dumps([name, t.dtype, list(t.shape), cuts[id(t.cut)]]) for name, t in self.tensors.items()]
        head = f'{{"format": {_FORMAT},\n"shards": {self.shards}'
        return f'{head},\n"cuts": [\n{_lines(texts)}],\n"tensors": [\n{_lines(rows)}]}}\n'.encode()

    @classmethod
    def decode(cls, data: bytes) -> Layout:
        """The layout of a checkpoint from the bytes of its file.

        Raises:
            CheckpointDamaged: if they are no layout, or its parts are not exactly the tensors.
        """
        found = parse_json(data, LAYOUT)
        try:
            if found["format"] != _FORMAT:
                raise CheckpointDamaged(f"{LAYOUT}: format {found['format']!r} is not known to this version")
            cuts = [_decode_cut(each) for each in found["cuts"]]
            tensors: dict[str, StoredTensor] = {}
            for name, dtype, shape, cut in found["tensors"]:
                if name in tensors:
                    raise ValueError(f"{name!r}: there twice")
                tensors[_text(name)] = StoredTensor(tuple(map(_count, shape)), _text(dtype), cuts[_count(cut)])
            if (shards := _count(found["shards"])) > _MOST_SHARDS:
                raise ValueError(f"{shards} shard files")
            return cls(tensors, shards)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointDamaged(f"{LAYOUT}: not readable ({type(error).__name__}: {error})") from None


def _lines(texts: Sequence[str]) -> str:
    return ",\n".join(texts)


def _decode_cut(found: Mapping[str, Any]) -> Cut:
    shards, offsets, lengths = (_ints(found[key]) for key in ("shards", "offsets", "lengths"))
    dims = offsets.shape[1] if offsets.ndim == 2 else 0
    if shards.ndim != 1 or offsets.shape[:1] != shards.shape or offsets.shape != lengths.shape:
        raise ValueError("the columns of a cut are not of one length")
    return Cut(np.stack([each.reshape(len(shards), dims) for each in (offsets, lengths)], axis=1), shards)


def _ints(value: Any) -> Ints:
    found = np.array(value)  # of lists of different lengths: ValueError
    if found.size and found.dtype.kind != "i":
        raise ValueError("a cut of something else than integers")
    return found.astype(np.int64)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} is no number of anything")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r} is no name")
    return value


def _problem(shape: tuple[int, ...], cut: Cut, shards: int) -> str | None:
    """Why the parts are not exactly the tensor; grows with the square of their number, once for each cut."""
    if len(shape) > _MOST_DIMS or prod(shape) >= 2**62:
        return f"no tensor is of shape {shape}"
    parts = len(cut.shards)
    if parts > _MOST_PARTS:
        return f"it has {parts} parts"
    if parts == 0:
        return None if prod(shape) == 0 else "it has no parts"
    if cut.boxes.shape != (parts, 2, len(shape)):
        return "its parts are of another number of dimensions"
    if cut.shards.min() < 0 or cut.shards.max() >= shards:
        return "a part is in a file that there is not"
    offsets, ends = cut.offsets, cut.offsets + cut.lengths
    if (offsets < 0).any() or (cut.lengths < 1).any() or (cut.lengths > shape).any() or (ends > shape).any():
        return "a part is not inside of it"
    if int(cut.lengths.prod(axis=1).sum()) != prod(shape):
        return "its parts are more or less than the whole"
    for start in range(0, parts, _BLOCK):
        some = slice(start, start + _BLOCK)
        meets = (offsets[some, None] < ends[None]) & (offsets[None] < ends[some, None])
        if int(meets.all(axis=2).sum()) != len(offsets[some]):  # each meets itself
            return "parts of it overlap"
    return None
