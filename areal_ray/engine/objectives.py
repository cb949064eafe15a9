"""Objectives: a loss of the model's output, with the weight that makes means over parts of a batch add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from areal_ray.config import ConfigError, ObjectiveConfig, plugin
from areal_ray.engine.hidden import Hidden
from areal_ray.run.metric_names import HELD_OUT, RESERVED

Batch = dict[str, torch.Tensor]
LossFn = Callable[[torch.Tensor, Batch], torch.Tensor]
LossWeightFn = Callable[[Batch], torch.Tensor | float]
FrozenModel = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]  # inputs of the model -> its output, no gradients
# Metrics of any run.
IGNORED = -100  # in labels: nothing is predicted at this position


class Objective(ABC):
    """A loss and how it is weighted; one's own is a subclass, named by `objective: {name: package.module:Class}`.

    All methods are given a micro-batch: a dict of this rank's tensors on its device, first dimension the rows. There is
    no `attention_mask` in it where the rows of the batch have no padding.

    Attributes:
        references: names of frozen models that `prepare` needs. Each is the run's model with its first weights; with an
            adapter it is the base, which is not held a second time.
        metrics: names of the values that `loss` may return beside the loss; all ranks sum all of them.
        takes_hidden: whether `loss` can do without the logits, and is given a `Hidden` where model.loss says chunked.
    """

    references: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    takes_hidden: bool = False

    def prepare(self, batch: Batch, models: Mapping[str, FrozenModel]) -> Batch:
        """The micro-batch with what frozen models say of it; called without gradients, just before the forward pass."""
        return batch

    @abstractmethod
    def model_inputs(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Keyword arguments of the model's forward."""

    @abstractmethod
    def weight(self, batch: Batch) -> torch.Tensor | float:
        """Weight of the micro-batch in the mean over all micro-batches and ranks: how much `loss` is a mean over.

        It is asked before `prepare`.
        """

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The mean over the micro-batch, a scalar, and means of other values to be logged, some of `metrics` by name.

        A micro-batch for which a value means nothing leaves it out. The output, the logits (B, S, vocabulary) or with
        `takes_hidden` perhaps a `Hidden`, must not be changed in place.
        """


class LanguageModeling(Objective):
    """Cross entropy of each token given those before it, in nats."""

    takes_hidden = True

    def model_inputs(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        return text_inputs(batch)

    def weight(self, batch: Batch) -> torch.Tensor:
        return predicted_tokens(batch)

    def loss(self, output: Any, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        return next_token_loss(output, batch), {}


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


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that the configuration names.

    Raises:
        ConfigError: if it cannot be found or made, or is none.
    """
    make = plugin.factory(config.name, "objective.name", {"language_modeling": LanguageModeling})
    made: Any = plugin.call(make, config.name, "objective.args", **config.args)
    if not isinstance(made, Objective):
        raise ConfigError(
            "objective.name", f"{config.name} gave a {type(made).__name__}, no areal_ray.engine.Objective"
        )
    if taken := [name for name in made.metrics if name in RESERVED or name.startswith(HELD_OUT)]:
        raise ConfigError(
            "objective.name", f"{config.name}: `{taken[0]}` is the name of a metric that there is already"
        )
    return made


def split(batch: Batch, size: int, device: torch.device) -> list[Batch]:
    """A batch on the device, in parts of at most `size` rows."""
    on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    rows = len(next(iter(on_device.values())))
    return [{name: t[i : i + size] for name, t in on_device.items()} for i in range(0, rows, size)]


def text_inputs(batch: Batch) -> Mapping[str, torch.Tensor]:
    """Inputs of a language model: input_ids, and attention_mask and position_ids where there are any."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


def next_token_loss(output: torch.Tensor | Hidden, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of each token given those before it, in nats.

    Args:
        output: logits (B, S, vocabulary), or what they are made of.
        batch: labels of shape (B, S), or input_ids and perhaps attention_mask, see `labels_of`.
    """
    labels = labels_of(batch)
    if isinstance(output, Hidden):
        total = output.cross_entropy(labels, IGNORED)
    else:
        logits = output.flatten(0, 1).float()
        total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / predicted_tokens(batch).clamp(min=1)


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
