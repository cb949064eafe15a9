"""What is minimised: functions of (logits, batch), with the weight that makes means over parts add up."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Batch = dict[str, torch.Tensor]
LossFn = Callable[[torch.Tensor, Batch], torch.Tensor]
LossWeightFn = Callable[[Batch], torch.Tensor]


def next_token_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of each token given those before it, in nats.

    Args:
        logits: (B, S, vocabulary).
        batch: input_ids and attention_mask of shape (B, S); a token counts if it is attended to.
    """
    targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    targets = F.pad(targets, (0, 1), value=-100)  # and not one position less of the logits, which would copy them all
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / predicted_tokens(batch).clamp(min=1)


def predicted_tokens(batch: Batch) -> torch.Tensor:
    """How many tokens `next_token_loss` is a mean over."""
    return batch["attention_mask"][:, 1:].sum()
