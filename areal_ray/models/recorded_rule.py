"""What a rule for first values does to a tensor, recorded without the tensor, so that it can be done to parts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

_FILLS = {torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar}
_DRAWS = {torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default}


class NeedsWholeTensor(Exception):
    """Raised into a rule that does something to a tensor which cannot be done to its parts one by one."""


@dataclass(frozen=True)
class Step:
    """An operation in place, element by element.

    Args:
        operation: called with a tensor and `args`; if it draws, with a generator too.
        args: numbers.
        draws: whether it is random.
        overwrites: whether what was there before does not matter.
        begin, end: the rows that it is done to.
    """

    operation: Callable[..., Any]
    args: tuple[Any, ...]
    draws: bool
    overwrites: bool
    begin: int
    end: int

    def apply(self, block: torch.Tensor, first: int, generator: torch.Generator) -> None:
        """Do it to a block of rows, the first of which is number `first`."""
        rows = block[max(0, self.begin - first) : max(0, self.end - first)]
        if len(rows):
            self.operation(rows, *self.args, **({"generator": generator} if self.draws else {}))


class StandIn(torch.Tensor):
    """A CPU tensor without memory, which records what is done to it and to its views.

    It is a number of rows: all dimensions but the last count as one; of a vector each element is a row. Recorded are
    normal_, uniform_, trunc_normal_, filling with a number, and arithmetic in place with numbers, all of it on the
    whole or on rows that follow each other. Anything else, reading a value for one, raises NeedsWholeTensor.

    Attributes:
        steps: what was done to the tensor, in order, its views included.
    """

    steps: list[Step]
    _view: torch.Tensor  # of a tensor on the meta device: the elements that this one stands for
    _width: int  # of a row

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, view: torch.Tensor, width: int, steps: list[Step]) -> StandIn:
        make: Any = torch.Tensor._make_wrapper_subclass
        made: StandIn = make(cls, view.shape, view.stride(), view.storage_offset(), dtype=view.dtype, device="cpu")
        made._view, made._width, made.steps = view, width, steps
        return made

    @staticmethod
    def of(tensor: torch.Tensor) -> StandIn:
        """A stand-in of the shape and dtype of a tensor of at least one dimension."""
        view = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return StandIn(view, view.shape[-1] if view.ndim > 1 else 1, [])

    @property
    def is_set(self) -> bool:
        """Whether its first step gives every element a value."""
        return (
            bool(self.steps) and self.steps[0].overwrites and self._rows() == (self.steps[0].begin, self.steps[0].end)
        )

    def record(self, operation: Callable[..., Any], args: tuple[Any, ...], draws: bool, overwrites: bool) -> None:
        """Add a step on the rows of this view."""
        if not all(each is None or type(each) in (int, float, bool) for each in args):
            raise NeedsWholeTensor(operation)
        self.steps.append(Step(operation, args, draws, overwrites, *self._rows()))

    def _rows(self) -> tuple[int, int]:
        begin, rest = divmod(int(self._view.storage_offset()), self._width)
        count, more = divmod(self._view.numel(), self._width)
        if rest or more or not self._view.is_contiguous():
            raise NeedsWholeTensor("these are no rows")
        return begin, begin + count

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        target, *others = args
        if not isinstance(target, StandIn) or any(isinstance(each, torch.Tensor) for each in tree_leaves(others)):
            raise NeedsWholeTensor(func)
        if func.is_view and func is not torch.ops.aten.view.dtype:
            found = func(target._view, *others, **(kwargs or {}))
            return tree_map_only(torch.Tensor, lambda view: StandIn(view, target._width, target.steps), found)
        # In place, as only there is the first argument changed; one that draws would need the block's generator.
        pointwise = func._schema.is_mutable and torch.Tag.pointwise in func.tags
        pointwise &= torch.Tag.nondeterministic_seeded not in func.tags
        if kwargs or not (func in _FILLS or func in _DRAWS or pointwise):
            raise NeedsWholeTensor(func)
        target.record(func, tuple(others), draws=func in _DRAWS, overwrites=not pointwise)
        return target


@contextmanager
def recording() -> Iterator[None]:
    """Let trunc_normal_ be recorded as one step: since torch 2.13 it reads what it has drawn, and draws some again."""
    own: Any = nn.init._no_grad_trunc_normal_

    def noted(
        tensor: torch.Tensor, mean: float, std: float, a: float, b: float, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        if not isinstance(tensor, StandIn) or generator is not None:
            return own(tensor, mean, std, a, b, generator=generator)
        tensor.record(own, (mean, std, a, b), draws=True, overwrites=True)
        return tensor

    nn.init._no_grad_trunc_normal_ = noted
    try:
        yield
    finally:
        nn.init._no_grad_trunc_normal_ = own
