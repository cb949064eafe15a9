"""The engine's interface: the loop sees this and never FSDP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.engine.objectives import Batch, LossFn, LossWeightFn, Objective


@dataclass(frozen=True)
class SaveLoadMeta:
    """Place and format of a save or load.

    Args:
        path: a directory; for a `dcp` save it must not exist, or be empty.
        weight_format: `dcp`, sharded and exact, or `hf`, safetensors that transformers reads; of an adapter that peft
            reads.
        with_optim: optimizer and schedule too (with `hf`: as DCP in the subdirectory `optim`). A load without them
            takes the weights of a full checkpoint as well.
        tokenizer: anything with `save_pretrained`, written beside the weights.

    Raises:
        ValueError: for another format.
    """

    path: str
    weight_format: str = "dcp"
    with_optim: bool = True
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if self.weight_format not in ("dcp", "hf"):
            raise ValueError(f"weight_format must be dcp or hf, not {self.weight_format!r}")


@dataclass(frozen=True)
class StepResult:
    """Numbers of a forward and backward pass over a global batch, the same on every rank.

    Args:
        loss: weighted mean over all micro-batches and ranks, a scalar on the device.
        grad_norm: 2-norm of all gradients before clipping, a scalar on the device.
        lr: the rate that the optimizer step will use.
        metrics: what the objective says beside the loss, means like it.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    lr: float
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def scalars(self) -> dict[str, torch.Tensor]:
        """All of it that is on the device, by the names of the run's metrics."""
        return {"loss": self.loss, "grad_norm": self.grad_norm, **self.metrics}

    def numbers(self) -> tuple[float, float]:
        """Loss and gradient norm. Waits for the device, once."""
        loss, grad_norm = torch.stack([self.loss, self.grad_norm]).tolist()
        return loss, grad_norm


@dataclass(frozen=True)
class EvalResult:
    """A loss and its weight, and other means with the same weight: scalars on the device, sums over all ranks."""

    loss: torch.Tensor
    weight: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


def finite(loss: float, grad_norm: float) -> bool:
    """Whether a step with these numbers leaves weights and optimizer state finite."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


class TrainEngine(Protocol):
    """A sharded model with its optimizer, after AReaL's engine. All methods but the properties are collectives.

    One optimizer step is `forward_backward`, then `optimizer_step` or `skip_step`, then `lr_scheduler_step`; who calls
    them decides in between. A batch is a dict of this rank's tensors, rows first, cut into micro-batches here.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def dp_rank(self) -> int:
        """This rank's part of the global batch; the ranks of a tensor group have the same."""
        ...

    @property
    def dp_size(self) -> int:
        """The number of parts that a global batch is cut into: the world size divided by that of a tensor group."""
        ...

    @property
    def state(self) -> Stateful:
        """Everything of the engine that a resumed run needs."""
        ...

    @property
    def lr(self) -> float:
        """The rate of the next optimizer step."""
        ...

    @property
    def skips_on_device(self) -> bool:
        """Whether `optimizer_step` takes `refused`; an optimizer of one's own need not support it."""
        ...

    def describe(self) -> dict[str, Any]:
        """world_size, mesh, and what `auto` was taken for: accumulate, loss. For the manifest."""
        ...

    def forward_backward(self, batch: Batch, objective: Objective) -> StepResult:
        """Gradients of the objective's mean over the global batch of which `batch` is this rank's part."""
        ...

    def optimizer_step(self, refused: torch.Tensor | None = None) -> None:
        """Clip the gradients, change the weights, drop the gradients.

        Args:
            refused: a float32 scalar on the device, known there when the update's turn comes: if it is 1, weights and
                optimizer state stay what they are, bit for bit; if it is 0, the step is as without it.
        """
        ...

    def skip_step(self) -> None:
        """Drop the gradients, if there are any; weights and optimizer state stay what they are."""
        ...

    def lr_scheduler_step(self) -> None:
        """The schedule goes on by one step, whether that changed the weights or not."""
        ...

    def evaluate(self, batch: Batch, objective: Objective) -> EvalResult:
        """The objective on this rank's part of a global batch, without gradients."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the model has the averages of `optim.ema` for its weights, to be evaluated or saved.

        They are exchanged in place: copies of the weights that are still being made must be waited for.
        """
        ...

    def train_batch(self, batch: Batch, loss_fn: LossFn, loss_weight_fn: LossWeightFn) -> dict[str, Any]:
        """A whole step, the schedule's included; the weights change if loss and gradient norm are finite.

        Args:
            batch: (B, S) tensors.
            loss_fn: (logits, micro-batch) -> scalar mean; must not change the logits in place.
            loss_weight_fn: micro-batch -> its weight in the mean over all micro-batches and ranks.

        Returns:
            loss and grad_norm (scalars of the global batch, before clipping), lr (the rate that was used), skipped
            (they were not finite).
        """
        ...

    def eval_batch(self, batch: Batch, loss_fn: LossFn, loss_weight_fn: LossWeightFn) -> dict[str, Any]:
        """loss (weighted mean over all ranks) and weight (its weight), without gradients."""
        ...

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits (B, S, vocabulary) of this rank's batch, without gradients."""
        ...

    def next_logits(self, input_ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Float32 logits (B, vocabulary) of the token after one position of each row, without gradients.

        The same rows on every rank of a mesh, as each gathers the model for its own. With model.loss=chunked no other
        logits are made.

        Args:
            input_ids: (B, S) of rows filled at their end.
            last: (B) of the last position of each that is no filling.
        """
        ...

    def save(self, meta: SaveLoadMeta) -> None: ...

    def load(self, meta: SaveLoadMeta) -> None: ...
