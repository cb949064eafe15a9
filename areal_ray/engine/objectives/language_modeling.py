"""Objectives that predict the next token: of text, of answers, and by functions of one's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from areal_ray.config import ConfigError
from areal_ray.engine.objectives.base import Batch, LossFn, LossWeightFn, Objective
from areal_ray.engine.objectives.text import predicted_tokens, regularised_loss, text_inputs


class LanguageModeling(Objective):
    """Cross entropy of each token given those before it, in nats.

    Args:
        z_loss, label_smoothing: see `regularised_loss`; with one of them `nll` in the metrics is the cross entropy
            alone.

    Raises:
        ConfigError: for a factor that is no such factor.
    """

    takes_hidden = True
    # Of the class: one's own subclass need not call __init__.
    _z_loss: float = 0.0
    _label_smoothing: float = 0.0

    def __init__(self, z_loss: float = 0.0, label_smoothing: float = 0.0) -> None:
        self._z_loss = number("z_loss", z_loss, 0.0, math.inf)
        self._label_smoothing = number("label_smoothing", label_smoothing, 0.0, 1.0)
        if self._is_regularised:
            self.metrics = (*self.metrics, "nll")

    @property
    def _is_regularised(self) -> bool:
        return bool(self._z_loss or self._label_smoothing)

    def model_inputs(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        return text_inputs(batch)

    def weight(self, batch: Batch) -> torch.Tensor:
        return predicted_tokens(batch)

    def loss(self, output: Any, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        loss, nll = regularised_loss(output, batch, self._z_loss, self._label_smoothing)
        return loss, {"nll": nll} if self._is_regularised else {}


class SupervisedFineTuning(LanguageModeling):
    """Cross entropy of the tokens of answers, in nats: of those, and only those, that `labels` names.

    The mean is one over all answers' tokens of the global batch, whatever rank and micro-batch they are in.

    Args:
        z_loss, label_smoothing: as for LanguageModeling.

    Raises:
        ConfigError: for a factor that is no such factor.
    """

    def weight(self, batch: Batch) -> torch.Tensor:
        if "labels" not in batch:
            raise ValueError(
                "objective sft: the rows of this data source have no `labels`, which say what is predicted"
            )
        return super().weight(batch)


class FunctionObjective(Objective):
    """Two functions as an objective, as `TrainEngine.train_batch` takes them.

    Args:
        loss_fn: (logits, micro-batch) -> scalar mean.
        loss_weight_fn: micro-batch -> its weight, a tensor or a number.
    """

    def __init__(self, loss_fn: LossFn, loss_weight_fn: LossWeightFn) -> None:
        self._loss_fn, self._loss_weight_fn = loss_fn, loss_weight_fn

    def model_inputs(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        return text_inputs(batch)

    def weight(self, batch: Batch) -> torch.Tensor | float:
        return self._loss_weight_fn(batch)

    def loss(self, output: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        return self._loss_fn(output, batch), {}


def number(name: str, value: Any, least: float, below: float) -> float:
    """A number among the arguments of an objective.

    Raises:
        ConfigError: if it is none, or not in [least, below).
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < below:
        limits = f"{least:g} or more" if below == math.inf else f"in [{least:g}, {below:g})"
        raise ConfigError(f"objective.args.{name}", f"must be a number, {limits}, not {value!r}")
    return float(value)
