"""A loss without the logits: of what a model computes before its output layer, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from areal_ray.config import Config, ConfigError

Loss = Literal["logits", "chunked"]

CHUNK_BYTES = 128 << 20  # of float32 logits that there are at a time
LARGE_BYTES = 256 << 20  # of float32 logits of a micro-batch, from which on there are never all of them


def choose(config: Config, vocabulary: int, why_not: str | None, recorded: Loss | None = None) -> Loss:
    """How a run computes its loss: what the configuration says, or else a choice for the run's whole life.

    The two differ in the last bits, so `auto` depends on nothing that a restart may change.

    Args:
        config: model.loss and the sizes in train are read.
        vocabulary: columns of the logits.
        why_not: why the model cannot do without logits; None if it can.
        recorded: the choice of the checkpoint that the run goes on from.

    Raises:
        ConfigError: if the model cannot do what the configuration says.
    """
    said = config.model.loss
    if said == "chunked" and why_not is not None:
        raise ConfigError("model.loss", f"chunked is not for this model: {why_not}")
    if why_not is not None:
        return "logits"
    if said != "auto":
        return said
    if recorded is not None:
        return recorded
    rows = config.train.micro_batch_size * config.train.seq_len
    return "chunked" if 4 * rows * vocabulary >= LARGE_BYTES else "logits"


@dataclass(frozen=True)
class Hidden:
    """The input of a model's output layer, and that layer: the logits are `finish(states @ weight.T + bias)`.

    Args:
        states: (B, S, width).
        weight: (vocabulary, width), whole, in the precision of the computation.
        bias: (vocabulary), or None.
        finish: scales or caps logits of any rows (1, rows, vocabulary), has no parameters; None: nothing.
    """

    states: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None

    def cross_entropy(self, labels: torch.Tensor, ignored: int = -100) -> torch.Tensor:
        """The sum of the cross entropies of the tokens that are to be predicted, in nats, in float32.

        Its memory grows with the states and the weight, whose gradients are made in the forward pass, and not with
        their product. The logits are those of the model, in its precision; a chunk of them is float32 for the softmax.

        torch has had `linear_cross_entropy`, which does the same, since 2.13; with bfloat16 states it gives the loss in
        bfloat16, too, of which three digits are right.

        Args:
            labels: (B, S), `ignored` where nothing is predicted.
            ignored: that label.
        """
        rows = self.states.flatten(0, -2)
        total: torch.Tensor = _ChunkedCrossEntropy.apply(
            rows, self.weight, self.bias, self.finish, labels.flatten(), ignored, torch.is_grad_enabled()
        )
        return total

    @torch.no_grad()
    def logits_at(self, positions: torch.Tensor) -> torch.Tensor:
        """The logits (B, vocabulary) of one position of each row, which (B) says."""
        states = self.states[torch.arange(len(positions), device=self.states.device), positions]
        logits = torch.nn.functional.linear(states, self.weight, self.bias)
        return logits if self.finish is None else self.finish(logits[None])[0]

    @torch.no_grad()
    def correct(self, labels: torch.Tensor, ignored: int = -100) -> torch.Tensor:
        """How many of the tokens that are to be predicted have the largest logit, in chunks of rows.

        A second product with the weight: it is for evaluation only.

        Args:
            labels: (B, S), `ignored` where nothing is predicted.
            ignored: that label.
        """
        rows, targets = self.states.flatten(0, -2), labels.flatten()
        count = torch.zeros((), dtype=torch.long, device=rows.device)
        step = max(1, CHUNK_BYTES // (4 * len(self.weight)))
        for first in range(0, len(rows), step):
            logits = torch.nn.functional.linear(rows[first : first + step], self.weight, self.bias)
            if self.finish is not None:
                logits = self.finish(logits[None])[0]
            wanted = targets[first : first + step]
            count += ((logits.argmax(-1) == wanted) & (wanted != ignored)).sum()
        return count


class _ChunkedCrossEntropy(torch.autograd.Function):
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
        labels: torch.Tensor,
        ignored: int,
        backward: bool,
    ) -> torch.Tensor:
        wanted = [backward and each for each in ctx.needs_input_grad[:3]]
        d_rows = torch.empty_like(rows) if wanted[0] else None
        d_weight = torch.zeros_like(weight) if wanted[1] else None
        d_bias = torch.zeros_like(bias) if wanted[2] and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        step = max(1, CHUNK_BYTES // (4 * len(weight)))
        for first in range(0, len(rows), step):
            chunk, targets = rows[first : first + step], labels[first : first + step]
            predicted = targets != ignored
            index = targets.masked_fill(~predicted, 0)[:, None]
            plain = torch.nn.functional.linear(chunk, weight, bias)
            finished = plain
            if finish is not None:
                with torch.set_grad_enabled(any(wanted)):
                    finished = finish(plain.requires_grad_(any(wanted))[None])[0]
            # A copy, where the backward pass of `finish` may need what it has given.
            logits = finished.detach().to(torch.float32, copy=finish is not None)
            chosen = logits.gather(1, index)
            norm = logits.logsumexp(1, keepdim=True)
            total += ((norm - chosen)[:, 0] * predicted).sum()
            if not any(wanted):
                continue
            # softmax minus one at the target, without another tensor of that size; nothing where nothing is predicted.
            d_logits = logits.sub_(norm).exp_()
            d_logits.scatter_add_(1, index, torch.full_like(chosen, -1.0))
            d_logits.mul_(predicted[:, None])
            d_logits = d_logits.to(finished.dtype)
            if finish is not None:
                (d_logits,) = torch.autograd.grad(finished, plain, d_logits)
            if d_rows is not None:
                torch.mm(d_logits, weight, out=d_rows[first : first + step])
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, chunk)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.gradients = d_rows, d_weight, d_bias
        return total

    @staticmethod
    def backward(ctx: Any, d_total: torch.Tensor) -> tuple[Any, ...]:
        assert ctx.gradients is not None, "a backward pass uses the gradients up"
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(d_total)
        return *gradients, None, None, None, None
