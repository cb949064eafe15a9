"""Means over predicted tokens beside the loss of language modelling: what an evaluation tells more of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from areal_ray.engine.hidden import Hidden
from areal_ray.engine.objectives import IGNORED, Batch, FrozenModel, Objective, labels_of, predicted_tokens

ACCURACY, BYTES = "accuracy", "bytes_per_token"
_MOST_NATS = 700.0  # beyond which a perplexity is no float64


class NextToken(Objective):
    """Another objective, whose weight is the number of predicted tokens, with more means over them.

    Args:
        objective: gives loss and weight, and its own metrics: one that it has itself is left as it gives it.
        wanted: of perplexity, bits_per_byte and accuracy.
        byte_lengths: bytes of text that each token id stands for, (vocabulary) on the device; for bits_per_byte.
    """

    def __init__(self, objective: Objective, wanted: Sequence[str], byte_lengths: torch.Tensor | None = None) -> None:
        self._objective, self._wanted, self._byte_lengths = objective, set(wanted), byte_lengths
        assert ("bits_per_byte" in self._wanted) == (byte_lengths is not None)
        self.references, self.takes_hidden = objective.references, objective.takes_hidden
        needed = ((ACCURACY, ACCURACY), (BYTES, "bits_per_byte"))
        self._own = [name for name, by in needed if by in self._wanted and name not in objective.metrics]
        self.metrics = (*objective.metrics, *self._own)

    def prepare(self, batch: Batch, models: Mapping[str, FrozenModel]) -> Batch:
        return self._objective.prepare(batch, models)

    def model_inputs(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        return self._objective.model_inputs(batch)

    def weight(self, batch: Batch) -> torch.Tensor | float:
        return self._objective.weight(batch)

    def loss(self, output: Any, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        loss, values = self._objective.loss(output, batch)
        labels, count = labels_of(batch), predicted_tokens(batch).clamp(min=1)
        more = dict(values)
        if ACCURACY in self._own:
            if isinstance(output, Hidden):
                correct = output.correct(labels, IGNORED)
            else:
                correct = ((output.argmax(-1) == labels) & (labels != IGNORED)).sum()
            more[ACCURACY] = correct / count
        if BYTES in self._own and self._byte_lengths is not None:
            predicted = labels != IGNORED
            lengths = self._byte_lengths[labels.masked_fill(~predicted, 0)]
            more[BYTES] = (lengths * predicted).sum() / count
        return loss, more

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """What is told of the means over all tokens of an evaluation, `loss` among them."""
        told = {name: value for name, value in means.items() if name != BYTES or BYTES not in self._own}
        nll = means.get("nll", means["loss"])  # of a regularised loss the cross entropy alone
        if "perplexity" in self._wanted and "perplexity" not in told:
            told["perplexity"] = math.exp(min(nll, _MOST_NATS))
        # 0: nothing that is predicted stands for text.
        if "bits_per_byte" in self._wanted and "bits_per_byte" not in told and means.get(BYTES):
            told["bits_per_byte"] = nll / math.log(2) / means[BYTES]
        return told
