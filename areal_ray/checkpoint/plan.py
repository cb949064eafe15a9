"""The plan of a save: which rank writes which parts. Made by rank 0, once for as long as the state is laid out alike.

As in DCP (torch.distributed.checkpoint.default_planner) a DTensor is written where its parts lie, and what several
ranks hold is written by the one that has the least to write. DCP's own planner makes objects of every part: 2.2 million
of them for 1,024 ranks of a 70B model. Here parts are rows of arrays, and ranks that cut tensors alike are told apart
by nothing but numbers.
"""

from __future__ import annotations

import pickle
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch.distributed.tensor import DTensor

from areal_ray.checkpoint.format.layout import Cut, Ints, Layout, StoredTensor
from areal_ray.checkpoint.format.shard_file import framed_size
from areal_ray.checkpoint.tree import box_of, is_here, local
from areal_ray.distributed import Ranks

_SMALL = 64 << 10  # bytes of a tensor that is not worth sharing out


@dataclass(frozen=True)
class _Held:
    """What a rank holds.

    Args:
        table: (name, shape, name of the type) of each tensor.
        boxes: offset and length of each one's part, one after the other.
        sizes: bytes of each part in a shard file.
    """

    table: list[tuple[str, tuple[int, ...], str]]
    boxes: Ints
    sizes: Ints

    @classmethod
    def by_this_rank(cls, tensors: Mapping[str, torch.Tensor]) -> _Held:
        held = {name: tensor for name, tensor in tensors.items() if is_here(tensor)}
        table = [(name, tuple(tensor.shape), _dtype(tensor)) for name, tensor in held.items()]
        boxes = [part for tensor in held.values() for part in box_of(tensor)]
        sizes = [framed_size(tuple(local(tensor).shape), tensor.dtype) for tensor in held.values()]
        return cls(table, _flat(boxes), np.array(sizes, np.int64))

    @property
    def digest(self) -> str:
        """Equal for ranks that hold parts of the same tensors in the same order."""
        return xxhash.xxh3_128_hexdigest(repr(self.table).encode())

    def pack(self, known: str) -> bytes:
        """A few KB, without the table where it is the one that the other side knows: it has all names."""
        table = None if self.digest == known else self.table
        return zlib.compress(pickle.dumps((table, self.boxes, self.sizes)), 1)

    @classmethod
    def unpack(cls, data: bytes, known: list[tuple[str, tuple[int, ...], str]]) -> _Held:
        table, boxes, sizes = pickle.loads(zlib.decompress(data))  # noqa: S301  (of another rank)
        return cls(known if table is None else table, boxes, sizes)


@dataclass(frozen=True)
class Places:
    """Where in their files the parts lie: for each part of each tensor of a layout, one after the other, in bytes."""

    offsets: Ints
    sizes: Ints


class SavePlan:
    """The plan of a save. A collective to make.

    Rank 0 receives a few KB of each rank and sends each the numbers of what it writes; with N ranks and T tensors it
    computes for about N x T x 1 microsecond.

    Args:
        tensors: plain ones equal on all ranks, DTensors in parts.
        ranks: all ranks of the job.

    Attributes:
        mine: names of the tensors of which this rank writes its part.
        planned: layout and places of all parts, on rank 0; None elsewhere.

    Raises:
        RankError: on every rank, if the parts are not exactly the tensors, or ranks disagree on a shape or type.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
        held = ranks.all_or_raise(lambda: _Held.by_this_rank(tensors))
        self._signature = _signature(tensors)
        packed = ranks.gather_to_rank_zero(held.pack(ranks.broadcast(held.digest)))

        def plan() -> tuple[list[bytes], Layout, Places] | None:
            return None if packed is None else plan_all([_Held.unpack(each, held.table) for each in packed])

        planned = ranks.all_or_raise(plan)
        shares = planned[0] if planned is not None else None
        self.planned = planned[1:] if planned is not None else None
        mine = np.frombuffer(zlib.decompress(ranks.scatter(shares)), np.int32)
        self.mine = [held.table[i][0] for i in mine]

    def fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether the plan is that of these tensors too: the same names, shapes and types, cut alike."""
        return _signature(tensors) == self._signature


def plan_all(held: Sequence[_Held]) -> tuple[list[bytes], Layout, Places]:
    """Plan for all ranks.

    Returns:
        For each rank the numbers, in its table, of what it writes (int32, compressed); the layout; the places.

    Raises:
        ValueError: if the parts are not exactly the tensors, or ranks disagree on a shape or type.
    """
    load = np.zeros(len(held), np.int64)  # bytes that each rank is to write
    cuts: dict[tuple[Any, ...], Cut] = {}
    tensors: dict[str, StoredTensor] = {}
    owners, numbers, sizes = [], [], []
    # Those that every rank reads come first, and all lie in one file: one table and one range for all of them.
    for name, shape, dtype, group in sorted(_by_tensor(held), key=lambda each: not _is_for_all(each[3], len(held))):
        boxes, ranks, number, size = group
        part, unique = _unique(boxes)
        if _is_for_all(group, len(held)):
            chosen = np.zeros(1, np.int64)
        else:
            chosen = _choose(part, len(unique), ranks, load)
            load[ranks[chosen]] += size[chosen]
        chosen = chosen[boxes[chosen, len(shape) :].all(axis=1)]  # nobody writes an empty part
        boxes, ranks = boxes[chosen].reshape(len(chosen), 2, len(shape)), ranks[chosen]
        key = shape, boxes.tobytes(), ranks.tobytes()
        tensors[name] = StoredTensor(shape, dtype, cuts.setdefault(key, Cut(boxes, ranks)))
        owners.append(ranks)
        numbers.append(number[chosen])
        sizes.append(size[chosen])
    owner, number, size = (np.concatenate(each) if each else np.zeros(0, np.int64) for each in (owners, numbers, sizes))
    by_owner = np.argsort(owner, kind="stable")  # in each file in the order of the tensors
    ends = np.cumsum(np.bincount(owner, minlength=len(held)))
    before = np.cumsum(size[by_owner]) - size[by_owner]
    offsets = np.empty_like(size)
    starts = np.concatenate([[0], ends[:-1]])
    first = np.zeros(len(held), np.int64)
    full = starts < ends
    first[full] = before[starts[full]]
    offsets[by_owner] = before - first[owner[by_owner]]
    shares = [zlib.compress(each.astype(np.int32).tobytes(), 1) for each in np.split(number[by_owner], ends[:-1])]
    return shares, Layout(tensors, len(held)), Places(offsets, size)


_Group = tuple[Ints, Ints, Ints, Ints]


def _is_for_all(group: _Group, ranks: int) -> bool:
    """Whether a tensor is small, and every rank holds all of it, as the optimizer's counts of steps."""
    boxes, who, _, sizes = group
    return len(who) == ranks and bool(sizes.max() <= _SMALL) and bool((boxes == boxes[0]).all())


def _choose(part: Ints, parts: int, ranks: Ints, load: Ints) -> Ints:
    """Which of the holders of each part writes it: one of those with the least to write.

    Where every part has as many holders, the first ones of all parts write the tensor, or the second ones, and so on:
    so tensors are cut in as many ways as there are replicas. If each part went its own way, every tensor would be cut
    in a way of its own.
    """
    order = np.lexsort((ranks, part))
    counts = np.bincount(part, minlength=parts)
    if (counts == counts[0]).all():
        holders = order.reshape(parts, counts[0])
        return holders[:, load[ranks[holders]].sum(axis=0).argmin()]
    order = np.lexsort((ranks, load[ranks], part))
    return order[np.searchsorted(part[order], np.arange(parts))]


def _by_tensor(held: Sequence[_Held]) -> list[tuple[str, tuple[int, ...], str, _Group]]:
    """Name, shape and type of each tensor; of the ranks that hold some of it: boxes, ranks, numbers in their tables,
    sizes."""
    alike: dict[str, list[int]] = defaultdict(list)
    digests: dict[int, str] = {}
    for rank, each in enumerate(held):
        alike[digests.setdefault(id(each.table), each.digest)].append(rank)
    found: dict[str, list[_Group]] = defaultdict(list)
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    for ranks in alike.values():
        who = np.array(ranks, np.int64)
        boxes = np.stack([held[rank].boxes for rank in ranks])
        sizes = np.stack([held[rank].sizes for rank in ranks])
        start = 0
        for number, (name, shape, dtype) in enumerate(held[ranks[0]].table):
            if kinds.setdefault(name, (shape, dtype)) != (shape, dtype):
                raise ValueError(f"{name!r} is {kinds[name]} on one rank and {(shape, dtype)} on rank {ranks[0]}")
            end = start + 2 * len(shape)
            found[name].append((boxes[:, start:end], who, np.full_like(who, number), sizes[:, number]))
            start = end
    return [(name, *kinds[name], groups[0] if len(groups) == 1 else _joined(groups)) for name, groups in found.items()]


def _joined(groups: Sequence[_Group]) -> _Group:
    boxes, ranks, numbers, sizes = (np.concatenate(column) for column in zip(*groups, strict=True))
    return boxes, ranks, numbers, sizes


def _unique(boxes: Ints) -> tuple[Ints, Ints]:
    """The number of each box among the different ones, which are in the order of their offsets; these."""
    if boxes.shape[1] == 0:
        return np.zeros(len(boxes), np.int64), boxes[:1]
    order = np.lexsort(boxes.T[::-1])
    new = np.concatenate([[False], (boxes[order][1:] != boxes[order][:-1]).any(axis=1)])
    part = np.empty(len(boxes), np.int64)
    part[order] = np.cumsum(new)
    return part, boxes[order][np.concatenate([[0], np.flatnonzero(new)])]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _flat(parts: Sequence[tuple[int, ...]]) -> Ints:
    return np.array([number for part in parts for number in part], np.int64)


def _signature(tensors: Mapping[str, torch.Tensor]) -> list[tuple[Any, ...]]:
    """What a plan depends on, cheap enough for every save."""
    return [
        (name, tensor.shape, tensor.dtype, local(tensor).shape)
        + ((tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ())
        for name, tensor in tensors.items()
    ]
