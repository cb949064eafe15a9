"""The engine's interface: the loop sees this and never FSDP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.engine.objectives import Batch, LossFn, LossWeightFn


@dataclass(frozen=True)
class SaveLoadMeta:
    """Where and how an engine saves or loads.

    Args:
        path: a directory; new for a `dcp` save.
        weight_format: `dcp`, sharded and exact, or `hf`, safetensors that transformers reads.
        with_optim: optimizer and schedule too (with `hf`: as DCP in the subdirectory `optim`).
    """

    path: str
    weight_format: Literal["dcp", "hf"] = "dcp"
    with_optim: bool = True


def finite(loss: float, grad_norm: float) -> bool:
    """Whether a step with these numbers leaves weights and optimizer state finite."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


class TrainEngine(Protocol):
    """A sharded model with its optimizer. All methods but the properties are collectives.

    A batch is a dict of this rank's tensors, `input_ids` and `attention_mask` of shape (B, S).
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def dp_rank(self) -> int:
        """Which part of the global batch is this rank's; the ranks of a tensor group have the same."""
        ...

    @property
    def dp_size(self) -> int:
        """Into how many parts a global batch is cut: the world size divided by that of a tensor group."""
        ...

    @property
    def state(self) -> Stateful:
        """Everything of the engine that a resumed run needs."""
        ...

    def initialize(self, weights: bool = True) -> None:
        """Build, shard and initialise; without weights, if they are loaded next."""
        ...

    def train_batch(self, batch: Batch, loss_fn: LossFn, loss_weight_fn: LossWeightFn) -> dict[str, Any]:
        """One optimizer step on the global batch of which `batch` is this rank's part.

        Args:
            batch: (B, S) tensors; cut into micro-batches here.
            loss_fn: (logits, micro-batch) -> scalar mean; must not change the logits in place.
            loss_weight_fn: micro-batch -> its weight in the mean over all micro-batches and ranks.

        Returns:
            loss and grad_norm (scalars of the global batch, before clipping), lr (the rate that was used), skipped
            (the numbers were refused: the schedule goes on, weights and optimizer state are what they were).
        """
        ...

    def skip_batch(self) -> dict[str, Any]:
        """A step that is left out: the schedule goes on, nothing else changes. As train_batch, but loss is NaN."""
        ...

    def eval_batch(self, batch: Batch, loss_fn: LossFn, loss_weight_fn: LossWeightFn) -> dict[str, Any]:
        """loss (weighted mean over all ranks) and weight (its weight), without gradients."""
        ...

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits (B, S, vocabulary) of this rank's batch, without gradients."""
        ...

    def save(self, meta: SaveLoadMeta) -> None: ...

    def load(self, meta: SaveLoadMeta) -> None: ...
