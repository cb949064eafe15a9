"""Sums and log-probabilities of some rows of logits at a time, with their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from areal_ray.engine.chunked.row_losses import RowLoss


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
        finish: Callable[[torch.Tensor], torch.Tensor] | None,
        row_loss: RowLoss,
        size: int,
        backward: bool,
    ) -> torch.Tensor:
        gradients = _Gradients(rows, weight, bias, [backward and each for each in ctx.needs_input_grad[:3]])
        sums = torch.zeros(row_loss.sums, dtype=torch.float32, device=rows.device)
        for chosen in _chunks(rows, size):
            plain, finished = _logits(rows[chosen], weight, bias, finish, gradients.any)
            # A copy, where the backward pass of `finish` may need what it has given.
            logits = finished.detach().to(torch.float32, copy=finish is not None)
            found, d_logits = row_loss(logits, chosen, gradients.any)
            sums += found
            if d_logits is not None:
                gradients.add(chosen, d_logits, plain, finished)
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
        finish: Callable[[torch.Tensor], torch.Tensor] | None,
        labels: torch.Tensor,
        ignored: int,
        size: int,
    ) -> torch.Tensor:
        found = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        for chosen in _chunks(rows, size):
            _, finished = _logits(rows[chosen], weight, bias, finish, False)
            logits, targets = finished.float(), labels[chosen]
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
        for chosen in _chunks(rows, size):
            plain, finished = _logits(rows[chosen], weight, bias, finish, gradients.any)
            logits = finished.detach().to(torch.float32, copy=finish is not None)
            targets = labels[chosen]
            predicted = targets != ignored
            index = targets.masked_fill(~predicted, 0)[:, None]
            # One at the target minus the softmax, in place.
            d_logits = logits.sub_(logits.logsumexp(1, keepdim=True)).exp_().neg_()
            d_logits.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))
            d_logits.mul_((d_found[chosen] * predicted)[:, None])
            gradients.add(chosen, d_logits, plain, finished)
        return *gradients.all, None, None, None, None


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

    def add(self, chosen: slice, d_logits: torch.Tensor, plain: torch.Tensor, finished: torch.Tensor) -> None:
        """Take the gradients of a chunk of logits.

        Args:
            chosen: which rows.
            d_logits: of the finished logits, float32.
            plain, finished: as `_logits` gave them, with gradients.
        """
        d_logits = d_logits.to(finished.dtype)
        if finished is not plain:
            (d_logits,) = torch.autograd.grad(finished, plain, d_logits)
        if self._d_rows is not None:
            torch.mm(d_logits, self._weight, out=self._d_rows[chosen])
        if self._d_weight is not None:
            self._d_weight.addmm_(d_logits.T, self._rows[chosen])
        if self._d_bias is not None:
            self._d_bias += d_logits.sum(0)


def _chunks(rows: torch.Tensor, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, len(rows))) for first in range(0, len(rows), size))


def _logits(
    chunk: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    finish: Callable[[torch.Tensor], torch.Tensor] | None,
    gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a chunk as the layer gives them and as the model does; the same tensor without `finish`."""
    plain = torch.nn.functional.linear(chunk, weight, bias)
    if finish is None:
        return plain, plain
    with torch.set_grad_enabled(gradients):
        return plain, finish(plain.requires_grad_(gradients)[None])[0]
