"""The weights among the tensors of a checkpoint."""

from __future__ import annotations

import torch

from areal_ray.checkpoint.reader import StoredState
from areal_ray.models.lazy_tensor import stored_tensors

_WEIGHTS, _AVERAGES = "engine.model.", "engine.ema."


def stored_weights(state: StoredState, averages: bool = False) -> dict[str, torch.Tensor]:
    """Weights by name, not read yet.

    Args:
        state: of a checkpoint.
        averages: take those of optim.ema; what has none (frozen parameters, buffers) is as it is.

    Raises:
        ValueError: if there are no averages.
    """
    weights = stored_tensors(state, _WEIGHTS)
    if averages:
        found = stored_tensors(state, _AVERAGES)
        if not found:
            raise ValueError("the checkpoint has no averages of the weights: its run had no optim.ema")
        weights |= found
    return weights
