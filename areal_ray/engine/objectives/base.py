"""The seam of objectives: a loss of a model's output, with the weight that makes means over parts of a batch add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from areal_ray.config import ModelConfig
from areal_ray.engine.hidden import Hidden

Batch = dict[str, torch.Tensor]
LossFn = Callable[[torch.Tensor, Batch], torch.Tensor]
LossWeightFn = Callable[[Batch], torch.Tensor | float]


class FrozenModel(Protocol):
    """A model that is not trained: sharded, without an optimizer, in no checkpoint. All of it is without gradients.

    Its methods are collectives, and take inputs of the model: keyword arguments of its forward.
    """

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The model's output, for a language model the logits (B, S, vocabulary)."""
        ...

    def log_probs(self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """The log-probability of each label, (B, S) in float32, 0 where it is -100.

        Where model.loss is chunked there are never all logits, as in training.
        """
        ...

    def output(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | Hidden:
        """The logits, or where model.loss is chunked what they are made of; its output layer then stays gathered."""
        ...


class Objective(ABC):
    """A loss and how it is weighted; one's own is a subclass, named by `objective: {name: package.module:Class}`.

    All methods are given a micro-batch: a dict of this rank's tensors on its device, first dimension the rows. There is
    no `attention_mask` in it where the rows of the batch have no padding.

    Attributes:
        references: names of frozen models that `prepare` needs. Each is the run's model with its first weights; with an
            adapter it is the base, which is not held a second time.
        reference_models: those of them that are another model, by name.
        metrics: names of the values that `loss` may return beside the loss; all ranks sum all of them.
        once: names of arrays, rows first, that `prepare` adds, and that follow from a row and the frozen models alone:
            they are computed for all rows before training. Batches then have them, and the models are not there.
        takes_hidden: whether `loss` can do without the logits, and is given a `Hidden` where model.loss says chunked.
    """

    references: tuple[str, ...] = ()
    reference_models: Mapping[str, ModelConfig] = {}
    metrics: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
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


def split(batch: Batch, size: int, device: torch.device) -> list[Batch]:
    """A batch on the device, in parts of at most `size` rows."""
    on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    rows = len(next(iter(on_device.values())))
    return [{name: t[i : i + size] for name, t in on_device.items()} for i in range(0, rows, size)]
