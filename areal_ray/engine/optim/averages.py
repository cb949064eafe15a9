"""Exponential moving averages of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from areal_ray.config import EmaConfig
from areal_ray.engine.optim.grid import local


class WeightAverages:
    """Exponential moving averages of the weights that are trained, sharded as they are.

    They begin as the first weights. An update takes a share of 1 - decay of the weights of now; the first ones take
    more, as after n updates the decay is at most (1 + n) / (10 + n). Which step is which update follows from the step,
    so that nothing of it is saved but the averages. They take as much memory as the weights, and nothing is sent.

    Args:
        model: sharded or not, with memory.
        config: optim.ema.
    """

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self._config = config
        self._weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.tensors = {name: torch.empty_like(weight) for name, weight in self._weights.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Begin with the weights of now."""
        for name, weight in self._weights.items():
            self.tensors[name].copy_(weight)

    @torch.no_grad()
    def update(self, step: int, refused: torch.Tensor | None = None) -> None:
        """Take the weights in that an optimizer step has made, if it is one of those.

        Args:
            step: counted from 1.
            refused: as `TrainEngine.optimizer_step` has it; if it is 1, the averages stay what they are, too.
        """
        if step % self._config.every_steps:
            return
        count = step // self._config.every_steps - 1
        share: float | torch.Tensor = 1 - min(self._config.decay, (1 + count) / (10 + count))
        if refused is not None:
            share = share * (1 - refused)
        for name, weight in self._weights.items():
            local(self.tensors[name]).lerp_(local(weight), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model has the averages for its weights. Costs a copy of the largest part at a time."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            kept = local(weight).clone()
            local(weight).copy_(local(self.tensors[name]))
            local(self.tensors[name]).copy_(kept)
