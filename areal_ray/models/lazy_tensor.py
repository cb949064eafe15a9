"""Tensors that are read when a part of them is asked for: what is done to the whole is done to the part only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

Box = tuple[tuple[int, int], ...]  # begin and end in each dimension
Read = Callable[[Box], torch.Tensor]

_aten: Any = torch.ops.aten


class LazyTensor(torch.Tensor):
    """A tensor of which nothing is in memory but how a part of it is read.

    Operations that move values about (cat, stack, split, transpose, view, ...) give another lazy tensor: a part of it
    is put together from those parts of its sources that it consists of. Any other operation reads its arguments whole,
    and gives an ordinary tensor.

    Made for transformers' conversions of weights between files and modules, which do only the former.
    """

    _read: Read

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, read: Read) -> LazyTensor:
        make: Any = torch.Tensor._make_wrapper_subclass
        made: LazyTensor = make(cls, torch.Size(shape), dtype=dtype, device="cpu")
        made._read = read
        return made

    def part(self, box: Box) -> torch.Tensor:
        """The values in a box, in memory."""
        shape = [end - begin for begin, end in box]
        if 0 in shape:
            return torch.empty(shape, dtype=self.dtype)
        found = self._read(box)
        assert list(found.shape) == shape, (found.shape, shape)
        return found

    def whole(self) -> torch.Tensor:
        """All values, in memory."""
        return self.part(whole_box(self.shape))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func)
        if rule is not None:
            return rule(*args, **(kwargs or {}))
        assert not func._schema.is_mutable, f"{func} would change a tensor that is not there"
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.whole, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


class Stored(Protocol):
    """Tensors that can be read in parts, as checkpoint.StoredState."""

    names: list[str]

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def part(self, name: str, box: Box) -> torch.Tensor: ...


def stored_tensors(stored: Stored, prefix: str) -> dict[str, torch.Tensor]:
    """Lazy tensors for those whose names begin with a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): LazyTensor(stored.shape(name), stored.dtype(name), partial(stored.part, name))
        for name in stored.names
        if name.startswith(prefix)
    }


def part_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The values in a box of a lazy tensor, or of one that is in memory."""
    if isinstance(tensor, LazyTensor):
        return tensor.part(box)
    return tensor[tuple(slice(begin, end) for begin, end in box)]


def whole_box(shape: Sequence[int]) -> Box:
    """The box of all values of a tensor of this shape."""
    return tuple((0, size) for size in shape)


def windows(box: Box, itemsize: int, limit: int) -> list[Box]:
    """A box cut into boxes of at most `limit` bytes, in the order of the values: of rows, or of parts of one row."""
    if not box:
        return [box]
    (begin, end), *others = box
    row = itemsize * prod(end - begin for begin, end in others)
    if row > limit and others:
        parts = windows(tuple(others), itemsize, limit)
        return [((first, first + 1), *part) for first in range(begin, end) for part in parts]
    rows = max(1, limit // max(1, row))
    return [((first, min(first + rows, end)), *others) for first in range(begin, end, rows)]


def _same(source: torch.Tensor, *_: Any, **how: Any) -> torch.Tensor:
    """clone, detach, contiguous and the like."""
    dtype = how.get("dtype") or source.dtype
    return LazyTensor(source.shape, dtype, lambda box: part_of(source, box).to(dtype))


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    dim %= tensors[0].ndim
    shape = list(tensors[0].shape)
    shape[dim] = sum(each.shape[dim] for each in tensors)
    for each in tensors:
        if each.shape[:dim] + each.shape[dim + 1 :] != tensors[0].shape[:dim] + tensors[0].shape[dim + 1 :]:
            raise ValueError(f"{tuple(each.shape)} and {tuple(tensors[0].shape)} cannot be put together")

    def read(box: Box) -> torch.Tensor:
        found, first = [], 0
        for each in tensors:
            begin, end = max(box[dim][0] - first, 0), min(box[dim][1] - first, each.shape[dim])
            if begin < end:
                found.append(part_of(each, (*box[:dim], (begin, end), *box[dim + 1 :])))
            first += each.shape[dim]
        return torch.cat(found, dim)

    return LazyTensor(shape, tensors[0].dtype, read)


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return _cat([_unsqueeze(each, dim) for each in tensors], dim % (tensors[0].ndim + 1))


def _unsqueeze(source: torch.Tensor, dim: int) -> torch.Tensor:
    dim %= source.ndim + 1
    shape = [*source.shape[:dim], 1, *source.shape[dim:]]
    return LazyTensor(shape, source.dtype, lambda box: part_of(source, (*box[:dim], *box[dim + 1 :])).unsqueeze(dim))


def _squeeze(source: torch.Tensor, dim: int) -> torch.Tensor:
    dim %= source.ndim
    return _select(source, dim, 0) if source.shape[dim] == 1 else _same(source)


def _select(source: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    dim, index = dim % source.ndim, index % source.shape[dim]
    shape = [*source.shape[:dim], *source.shape[dim + 1 :]]
    return LazyTensor(
        shape,
        source.dtype,
        lambda box: part_of(source, (*box[:dim], (index, index + 1), *box[dim:])).squeeze(dim),
    )


def _slice(
    source: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> torch.Tensor:
    dim %= source.ndim
    first, last, _ = slice(start, end).indices(source.shape[dim])
    if step != 1:
        return torch.stack(_unbind(source, dim)[first:last:step], dim)
    shape = [*source.shape[:dim], max(0, last - first), *source.shape[dim + 1 :]]

    def read(box: Box) -> torch.Tensor:
        begin, end = box[dim]
        return part_of(source, (*box[:dim], (begin + first, end + first), *box[dim + 1 :]))

    return LazyTensor(shape, source.dtype, read)


def _split(source: torch.Tensor, sizes: int | Sequence[int], dim: int = 0) -> list[torch.Tensor]:
    length = source.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - first) for first in range(0, length, sizes)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_slice(source, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _unbind(source: torch.Tensor, dim: int = 0) -> list[torch.Tensor]:
    return [_select(source, dim, i) for i in range(source.shape[dim])]


def _permute(source: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    order = [dim % source.ndim for dim in dims]
    place = {dim: i for i, dim in enumerate(order)}

    def read(box: Box) -> torch.Tensor:
        return part_of(source, tuple(box[place[dim]] for dim in range(source.ndim))).permute(order)

    return LazyTensor([source.shape[dim] for dim in order], source.dtype, read)


def _transpose(source: torch.Tensor, first: int, second: int) -> torch.Tensor:
    order = list(range(source.ndim))
    order[first], order[second] = order[second], order[first]
    return _permute(source, order)


def _view(source: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The same values in their order, in another shape; read in whole rows of the source."""
    known = prod(each for each in size if each != -1)
    shape = [source.numel() // max(1, known) if each == -1 else each for each in size]
    row, source_row = prod(shape[1:]), prod(source.shape[1:])
    if not shape or not source.ndim:
        return LazyTensor(shape, source.dtype, lambda _: part_of(source, whole_box(source.shape)).reshape(shape))

    def read(box: Box) -> torch.Tensor:
        (begin, end), *others = box
        first = begin * row // source_row
        last = -(-end * row // source_row)
        rows = part_of(source, ((first, last), *whole_box(source.shape[1:]))).reshape(-1)
        rows = rows[begin * row - first * source_row : end * row - first * source_row]
        return rows.view(end - begin, *shape[1:])[(slice(None), *(slice(*each) for each in others))]

    return LazyTensor(shape, source.dtype, read)


_RULES: dict[Any, Callable[..., Any]] = {
    _aten.alias.default: _same,
    _aten.clone.default: _same,
    _aten.detach.default: _same,
    _aten._to_copy.default: _same,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.squeeze.dim: _squeeze,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.unbind.int: _unbind,
    _aten.permute.default: _permute,
    _aten.transpose.int: _transpose,
    _aten.t.default: lambda source: _transpose(source, 0, 1) if source.ndim == 2 else _same(source),
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten._reshape_alias.default: lambda source, size, _: _view(source, size),
}
