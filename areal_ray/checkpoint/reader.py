"""Loading: no byte is used before its checksum is verified."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint.format.contents import Contents, torch_dtype
from areal_ray.checkpoint.format.layout import StoredTensor
from areal_ray.checkpoint.format.manifest import STATE, CheckpointDamaged, CheckpointUnreadable, Manifest
from areal_ray.checkpoint.parts import read_tensors
from areal_ray.checkpoint.read_lock import read_lock
from areal_ray.checkpoint.tree import flatten, merge
from areal_ray.distributed import RankError, Ranks
from areal_ray.storage import Storage, read_ahead

AGAIN_S = 1.0  # after which what could not be read is tried once more: some errors pass
_PART_BYTES = 4 << 20  # of tensors that tools read ahead in one go, and take three times as much while they are


def load(directory: Storage, state: Mapping[str, Stateful], ranks: Ranks, part: bool = False) -> Manifest:
    """Bring objects to the state that a checkpoint holds, at any world size and mesh. A collective.

    Rank 0 reads what the checkpoint says of itself and sends it to the others: it grows with the shard files and the
    tensors, not with their product. Each rank reads the tables of the shards that it needs parts of (one, where nothing
    has changed), and of these what overlaps its own.

    Args:
        directory: a committed checkpoint.
        state: the objects, by the names under which they were saved. Tensors are filled in place. One that has a
            method `expect` is told first which of its tensors the checkpoint has.
        ranks: all ranks of the job.
        part: let the checkpoint hold more than the objects have; what is left over is not read.

    Raises:
        RankError: on every rank, if the checkpoint is damaged anywhere (each rank checks what it reads).
        ValueError: if it holds other tensors, or of other shapes, than the objects have.
    """
    with read_lock(directory) if ranks.rank == 0 else nullcontext():
        contents = Contents.decode(ranks.on_rank_zero(lambda: Contents.read(directory)))
        stored = contents.layout.tensors
        for name, each in state.items():
            if expect := getattr(each, "expect", None):
                expect({key.removeprefix(f"{name}.") for key in stored if key.startswith(f"{name}.")})
        trees = {name: each.state_dict() for name, each in state.items()}
        tensors, _ = flatten(trees)
        _check_keys(tensors, stored, directory.location, part)
        ranks.all_or_raise(lambda: read_tensors(directory, contents, tensors))
        other = ranks.all_or_raise(lambda: _take_over(state, trees, contents.values))
        if other is not None:
            raise other
    return contents.manifest


def damage_on_loading(directory: Storage, state: Mapping[str, Stateful], ranks: Ranks) -> str | None:
    """Load a checkpoint as `load` does; the damage that was found, or None. A collective."""
    for again in (True, False):
        try:
            load(directory, state, ranks)
            return None
        except RankError as error:
            if not error.only(CheckpointDamaged):
                raise
            if not (again and error.only(CheckpointUnreadable)):
                return str(error)
        time.sleep(AGAIN_S)
    raise AssertionError("unreachable")


def _take_over(
    state: Mapping[str, Stateful], trees: Mapping[str, Mapping[str, Any]], values: Mapping[str, Mapping[str, Any]]
) -> Exception | None:
    """Hand the objects what was saved; what one of them raises for other reasons, to be raised as it is.

    Raises:
        CheckpointDamaged: if values are missing, or not of the types that the objects have now.
    """
    _check_types(flatten(trees)[1], values, "")
    for name, each in state.items():
        try:
            each.load_state_dict(merge(trees[name], values.get(name, {})))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            text = f"{STATE}: {name!r} cannot go on from its values ({type(error).__name__}: {error})"
            raise CheckpointDamaged(text) from error
        except Exception as error:  # noqa: BLE001  (raised again: it is no damage)
            return error
    return None


def _check_types(own: Mapping[str, Any], saved: Mapping[str, Any], path: str) -> None:
    """Raise CheckpointDamaged for a value of another type than the object's own; a number may be whole or not.

    What either does not have is for the object: it may be older, or younger, than the checkpoint. So is None.
    """
    for key in own.keys() & saved.keys():
        mine, its = own[key], saved[key]
        number = type(mine) is int and type(its) in (int, float)
        if type(mine) in (int, str, list, dict) and type(its) is not type(mine) and not number:
            raise CheckpointDamaged(f"{STATE}: {path}{key} is a {type(its).__name__}, not a {type(mine).__name__}")
        if type(mine) is dict:
            _check_types(mine, its, f"{path}{key}.")


class StoredState:
    """The contents of a checkpoint, for tools: tensors or parts of them, in one process; needs a `read_lock`.

    Args:
        directory: a committed checkpoint.
        found: what `Contents.read` gives of it, if somebody has read that already.

    Raises:
        CheckpointDamaged: here and on reading, if the bytes are not those that were written.
    """

    def __init__(self, directory: Storage, found: list[bytes] | None = None) -> None:
        self._directory = directory
        self._contents = Contents.decode(Contents.read(directory) if found is None else found)
        self.manifest, self.values = self._contents.manifest, self._contents.values
        self.info = self.manifest.info
        self.names = sorted(self._contents.layout.tensors)

    @classmethod
    def open(cls, directory: Storage, ranks: Ranks) -> StoredState:
        """The contents of a checkpoint, of which rank 0 reads what it says of itself. A collective.

        Raises:
            RankError: on every rank, if it is damaged.
        """
        return cls(directory, ranks.on_rank_zero(lambda: Contents.read(directory)))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._contents.layout.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self._contents.layout.tensors[name].dtype)

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, put together from all shards."""
        return self._read([name])[name]

    def part(self, name: str, box: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The values in a box of a tensor: from where to where in each dimension."""
        part = torch.empty([end - begin for begin, end in box], dtype=self.dtype(name))
        offsets = {name: tuple(begin for begin, _ in box)}
        read_tensors(self._directory, self._contents, {name: part}, one_by_one=True, offsets=offsets)
        return part

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors by name, in this order; those that come next are read meanwhile, a bounded number of bytes."""
        for read in read_ahead((3 * size, partial(self._read, part)) for size, part in self._parts(names)):
            yield from read.items()

    def _parts(self, names: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
        """Bytes and names of what is read in one go: small tensors together, as they are neighbours in the shards."""
        part, size = list[str](), 0
        for name in names:
            more = torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize
            if part and size + more > _PART_BYTES:
                yield size, part
                part, size = [], 0
            part.append(name)
            size += more
        if part:
            yield size, part

    def _read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        tensors = {name: torch.empty(self.shape(name), dtype=self.dtype(name)) for name in names}
        read_tensors(self._directory, self._contents, tensors, one_by_one=True)
        return tensors


def _check_keys(tensors: Mapping[str, torch.Tensor], saved: Mapping[str, StoredTensor], where: str, part: bool) -> None:
    """What is too much or too little, in both directions."""
    problems = [f"missing in it: {name}" for name in sorted(set(tensors) - set(saved))]
    if not part:
        problems += [f"unknown here: {name}" for name in sorted(set(saved) - set(tensors))]
    for name in sorted(set(saved) & set(tensors)):
        entry, tensor = saved[name], tensors[name]
        if entry.shape != tuple(tensor.shape):
            problems.append(f"{name} is {entry.shape} in it and {tuple(tensor.shape)} here")
        elif torch_dtype(entry.dtype) != tensor.dtype:
            problems.append(f"{name} is torch.{entry.dtype} in it and {tensor.dtype} here")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"checkpoint {where} does not fit this model: {'; '.join(problems[:8])}{more}")
