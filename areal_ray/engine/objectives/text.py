"""What objectives of language models share: inputs, labels, and losses of tokens, with the logits or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from areal_ray.engine.hidden import Hidden
from areal_ray.engine.objectives.base import Batch

IGNORED = -100  # in labels: nothing is predicted at this position


class TokenLoss(NamedTuple):
    """Means over the tokens that are predicted, scalars in float32.

    Args:
        loss: what is minimised.
        nll: of it the cross entropy with the labels alone, without gradients.
    """

    loss: torch.Tensor
    nll: torch.Tensor


def text_inputs(batch: Batch) -> Mapping[str, torch.Tensor]:
    """Inputs of a language model: input_ids, and attention_mask and position_ids where there are any."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


def next_token_loss(output: torch.Tensor | Hidden, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of each token given those before it, in nats.

    Args:
        output: logits (B, S, vocabulary), or what they are made of.
        batch: labels of shape (B, S), or input_ids and perhaps attention_mask, see `labels_of`.
    """
    return regularised_loss(output, batch).loss


def regularised_loss(
    output: torch.Tensor | Hidden, batch: Batch, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> TokenLoss:
    """Mean cross entropy of each token given those before it, in nats, and what keeps it from being too sure.

    Args:
        output: logits (B, S, vocabulary), or what they are made of.
        batch: as for `next_token_loss`.
        z_loss: factor of the squared logarithm of the softmax's denominator, which keeps logits small (PaLM, Chowdhery
            et al. 2022, section 5: 1e-4).
        label_smoothing: share of the target that is spread evenly over the vocabulary (Szegedy et al. 2016, as
            torch's cross_entropy has it).
    """
    labels = labels_of(batch)
    count = predicted_tokens(batch).clamp(min=1)
    if isinstance(output, Hidden):
        total, nll = output.regularised(labels, IGNORED, z_loss, label_smoothing)
        return TokenLoss(total / count, nll / count)
    logits, targets = output.flatten(0, 1).float(), labels.flatten()
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    total = nll
    if label_smoothing:
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        total = total + z_loss * (logits.logsumexp(1).square() * (targets != IGNORED)).sum()
    return TokenLoss(total / count, nll.detach() / count)


def token_log_probs(output: torch.Tensor | Hidden, labels: torch.Tensor) -> torch.Tensor:
    """The log-probability of each label, (B, S) in float32, 0 where nothing is predicted.

    Args:
        output: logits (B, S, vocabulary), or what they are made of.
        labels: (B, S), -100 where nothing is predicted.
    """
    if isinstance(output, Hidden):
        return output.log_probs(labels, IGNORED)
    # Of the logits as they are, flat: a cross entropy of each position, which copies nothing else of their size.
    logits = output.flatten(0, 1).float()
    nll = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
    return -nll.view_as(labels)


def predicted_tokens(batch: Batch) -> torch.Tensor:
    """Number of tokens that `next_token_loss` is a mean over."""
    return (labels_of(batch) != IGNORED).sum()


def labels_of(batch: Batch) -> torch.Tensor:
    """The token to predict at each position, (B, S); -100 for none.

    A batch without `labels` is text in which every attended token but the first of a row is predicted; without
    `attention_mask` all are attended.
    """
    if "labels" in batch:
        return batch["labels"]
    targets = batch["input_ids"][:, 1:]
    if "attention_mask" in batch:
        targets = targets.masked_fill(batch["attention_mask"][:, 1:] == 0, IGNORED)
    # Of the logits no position is cut off instead: that would copy them all.
    return F.pad(targets, (0, 1), value=IGNORED)
