"""Distillation: a model learns from what a larger one would say, beside what the text says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from areal_ray.config import ConfigError, ModelConfig
from areal_ray.engine.hidden import Hidden
from areal_ray.engine.objectives.base import Batch, FrozenModel, Objective
from areal_ray.engine.objectives.language_modeling import number
from areal_ray.engine.objectives.text import IGNORED, labels_of, predicted_tokens, text_inputs, token_log_probs

TEACHER = "teacher"  # name of the frozen model, and of its output in a prepared batch


class Distillation(Objective):
    """Cross entropy, and the divergence from a frozen teacher's distribution (Hinton et al. 2015, arXiv:1503.02531).

    A predicted token costs (1 - a) (cross entropy with its label) + a T^2 KL(teacher || student), see DistilledRows;
    the loss is the mean over those of the global batch. The teacher must have the tokenizer of the run. It is sharded
    as the model is, and costs its own forward pass and weights (in float32, a shard on each rank). With
    model.loss=chunked there are never all logits of either, and its output layer stays gathered on each rank.

    Args:
        teacher: a Hugging Face directory or hub name of a causal language model.
        temperature: T, by which both logits are divided.
        share: a, of the teacher in the loss, from 0 to 1.

    Raises:
        ConfigError: for anything else.
    """

    references = (TEACHER,)
    metrics = ("cross_entropy", "divergence")
    takes_hidden = True

    def __init__(self, teacher: str, temperature: float = 1.0, share: float = 0.5) -> None:
        if not isinstance(teacher, str) or not teacher:
            raise ConfigError("objective.args.teacher", f"must be a directory or a hub name, not {teacher!r}")
        self._temperature = number("temperature", temperature, 0.0, math.inf)
        if not self._temperature:
            raise ConfigError("objective.args.temperature", "must be greater than 0")
        self._share = number("share", share, 0.0, math.inf)
        if self._share > 1:
            raise ConfigError("objective.args.share", f"must be from 0 to 1, not {share}")
        self.reference_models = {TEACHER: ModelConfig(path=teacher)}

    def prepare(self, batch: Batch, models: Mapping[str, FrozenModel]) -> Batch:
        # A batch is of tensors; where there are no logits, a Hidden is handed on to `loss` beside them.
        said: Any = models[TEACHER].output(text_inputs(batch))
        return batch | {TEACHER: said}

    def model_inputs(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        return text_inputs(batch)

    def weight(self, batch: Batch) -> torch.Tensor:
        return predicted_tokens(batch)

    def loss(self, output: Any, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        teacher: torch.Tensor | Hidden = batch[TEACHER]
        labels, count = labels_of(batch), predicted_tokens(batch).clamp(min=1)
        if isinstance(output, Hidden):
            total, nll, divergence = output.distilled(teacher, labels, IGNORED, self._temperature, self._share)
            return total / count, {"cross_entropy": nll / count, "divergence": divergence / count}
        assert not isinstance(teacher, Hidden), "it is one only where the model's output is"
        nll = -token_log_probs(output, labels).sum() / count
        divergence = self._divergence(output, teacher, labels != IGNORED) / count
        loss = (1 - self._share) * nll + self._share * divergence
        return loss, {"cross_entropy": nll.detach(), "divergence": divergence.detach()}

    def _divergence(self, logits: torch.Tensor, teacher: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """T^2 KL(teacher || student) summed over the predicted tokens, in the columns that both have."""
        columns = min(logits.shape[-1], teacher.shape[-1])
        mine, theirs = ((each[..., :columns].float() / self._temperature).log_softmax(-1) for each in (logits, teacher))
        rows = F.kl_div(mine, theirs, reduction="none", log_target=True).sum(-1)
        return self._temperature**2 * (rows * predicted).sum()
