"""Sums and log-probabilities of some rows of logits at a time, with their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from areal_ray.engine.chunked.row_losses import RowLoss, normalised

_Finish = Callable[[torch.Tensor], torch.Tensor]


class ChunkedSums(torch.autograd.Function):
    """Forward and backward pass of one chunk of rows after the other, both in the forward pass.

    The gradient of a sum is linear in that of the sum itself, a number, with which the backward pass multiplies. That
    saves computing the logits twice: it is as many matrix products as with all logits at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        finish: _Finish | None,
        row_loss: RowLoss,
        size: int,
        backward: bool,
    ) -> torch.Tensor:
        gradients = _Gradients(rows, weight, bias, [backward and each for each in ctx.needs_input_grad[:3]])
        chunks = _Chunks(rows, weight, bias, finish, size, gradients.any)
        sums = torch.zeros(row_loss.sums, dtype=torch.float32, device=rows.device)
        for chosen, made in chunks:
            found = row_loss(made.logits, chosen, made.spare)
            sums += found.sums
            if found.d_logits is not None:
                gradients.add(chosen, found.d_logits, found.factors, made)
        ctx.gradients = gradients.all
        return sums

    @staticmethod
    def backward(ctx: Any, d_sums: torch.Tensor) -> tuple[Any, ...]:
        assert ctx.gradients is not None, "a backward pass uses the gradients up"
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(d_sums[0])
        return *gradients, None, None, None, None


class ChunkedLogProbs(torch.autograd.Function):
    """Log-probabilities of one chunk of rows after the other; again in the backward pass, with what they are to be
    multiplied with."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        finish: _Finish | None,
        labels: torch.Tensor,
        ignored: int,
        size: int,
    ) -> torch.Tensor:
        found = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        for chosen, made in _Chunks(rows, weight, bias, finish, size, False):
            logits, targets = made.logits, labels[chosen]
            predicted = targets != ignored
            at = logits.gather(1, targets.masked_fill(~predicted, 0)[:, None])
            found[chosen] = (at - logits.logsumexp(1, keepdim=True))[:, 0] * predicted
        # Not by save_for_backward: FSDP owns the gathered weight, whose memory is there until this pass is over.
        ctx.given = rows, weight, bias, finish, labels, ignored, size
        return found

    @staticmethod
    def backward(ctx: Any, d_found: torch.Tensor) -> tuple[Any, ...]:
        assert ctx.given is not None, "a backward pass uses them up"
        (rows, weight, bias, finish, labels, ignored, size), ctx.given = ctx.given, None
        gradients = _Gradients(rows, weight, bias, list(ctx.needs_input_grad[:3]))
        for chosen, made in _Chunks(rows, weight, bias, finish, size, True):
            targets = labels[chosen]
            predicted = targets != ignored
            index = targets.masked_fill(~predicted, 0)[:, None]
            assert made.spare is not None
            # The softmax minus one at the target, which is to be multiplied with minus what was asked.
            d_logits, _ = normalised(made.logits, made.spare)
            d_logits.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=torch.float32))
            gradients.add(chosen, d_logits, -(d_found[chosen] * predicted), made)
        return *gradients.all, None, None, None, None


@dataclass(frozen=True)
class _Made:
    """The logits of a chunk.

    Args:
        logits: finished, in float32; their memory may be used.
        spare: other memory of that shape; None where no gradients are wanted.
        plain, finished: as the layer gives them and as the model does, in its precision; the same tensor, if the model
            does nothing to them.
    """

    logits: torch.Tensor
    spare: torch.Tensor | None
    plain: torch.Tensor
    finished: torch.Tensor


class _Chunks:
    """The logits of one chunk of rows after the other, in memory that is used again: new memory costs as much as a
    pass over it, where the system has to clear it first.

    Args:
        rows, weight, bias: of the output layer.
        finish: what the model does to the logits; None: nothing.
        size: rows of a chunk.
        gradients: whether there is to be spare memory, and a graph of `finish`.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        finish: _Finish | None,
        size: int,
        gradients: bool,
    ) -> None:
        self._rows, self._weight, self._bias, self._finish = rows, weight, bias, finish
        self._size, self._gradients = size, gradients
        shape = min(size, len(rows)), len(weight)
        exact: Any = {"dtype": torch.float32, "device": rows.device}
        self._exact = torch.empty(shape, **exact)
        self._plain = self._exact
        if finish is None and rows.dtype != torch.float32:
            self._plain = torch.empty(shape, dtype=rows.dtype, device=rows.device)
        self._spare = torch.empty(shape, **exact) if gradients else None

    def __iter__(self) -> Iterator[tuple[slice, _Made]]:
        for first in range(0, len(self._rows), self._size):
            chosen = slice(first, min(first + self._size, len(self._rows)))
            yield chosen, self._make(self._rows[chosen])

    def _make(self, chunk: torch.Tensor) -> _Made:
        count = len(chunk)
        spare = self._spare[:count] if self._spare is not None else None
        if self._finish is None:
            plain = finished = self._product(chunk, self._plain[:count])
        else:
            # A tensor of its own, as a graph is made of it.
            plain = torch.nn.functional.linear(chunk, self._weight, self._bias)
            with torch.set_grad_enabled(self._gradients):
                finished = self._finish(plain.requires_grad_(self._gradients)[None])[0]
        logits = self._exact[:count]
        # A copy, where the backward pass of `finish` may need what it has given.
        return _Made(logits if logits.is_set_to(finished) else logits.copy_(finished.detach()), spare, plain, finished)

    def _product(self, chunk: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self._bias is None:
            return torch.mm(chunk, self._weight.T, out=out)
        return torch.addmm(self._bias, chunk, self._weight.T, out=out)


class _Gradients:
    """Gradients of rows, weight and bias, made chunk by chunk of rows.

    Args:
        rows, weight, bias: of the output layer.
        wanted: for which of them.
    """

    def __init__(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: list[bool]) -> None:
        self._rows, self._weight, self.any = rows, weight, any(wanted)
        self._d_rows = torch.empty_like(rows) if wanted[0] else None
        self._d_weight = torch.zeros_like(weight) if wanted[1] else None
        self._d_bias = torch.zeros_like(bias) if wanted[2] and bias is not None else None

    @property
    def all(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        return self._d_rows, self._d_weight, self._d_bias

    def add(self, chosen: slice, d_logits: torch.Tensor, factors: torch.Tensor, made: _Made) -> None:
        """Take the gradients of a chunk of logits.

        Args:
            chosen: which rows.
            d_logits: of the finished logits, float32.
            factors: (rows), with which they are to be multiplied.
            made: the logits.
        """
        if made.finished is not made.plain:
            (d_logits,) = torch.autograd.grad(made.finished, made.plain, d_logits.to(made.finished.dtype))
        elif d_logits.dtype != made.plain.dtype:
            d_logits = made.plain.copy_(d_logits)  # nobody needs the logits any more
        scale, dtype = factors[:, None], self._rows.dtype
        if self._d_rows is not None:
            torch.mm(d_logits, self._weight, out=self._d_rows[chosen]).mul_(scale)
        if self._d_weight is not None:
            self._d_weight.addmm_(d_logits.T, (self._rows[chosen] * scale).to(dtype))
        if self._d_bias is not None:
            self._d_bias.addmv_(d_logits.T, factors.to(dtype))
