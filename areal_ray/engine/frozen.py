"""Frozen models: what an objective's references are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from areal_ray.engine.hidden import Hidden
from areal_ray.engine.objectives import token_log_probs
from areal_ray.engine.sharded_model import ShardedModel


class FrozenShards:
    """A FrozenModel of a sharded one: in evaluation mode and without gradients.

    Args:
        model: it may be the one that is trained; then it is as before afterwards.
        chunked: whether to do without the logits, if the model can.
        meanwhile: entered around a forward pass, for instance to leave adapters out of the model.
    """

    def __init__(
        self,
        model: ShardedModel,
        chunked: bool = False,
        meanwhile: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._model, self._meanwhile = model, meanwhile
        self._forward = model.hidden if chunked and model.needs_logits is None else model

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with self._as_frozen():
            return self._model(inputs)

    def log_probs(self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        with self._as_frozen():
            return token_log_probs(self._forward(inputs), labels)

    def output(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | Hidden:
        # Its output layer is needed by whoever computes with it; that of a model that is trained would be saved so.
        with self._as_frozen(reshard=False):
            return self._forward(inputs)

    @contextmanager
    def _as_frozen(self, reshard: bool = True) -> Iterator[None]:
        module = self._model.module
        trained = module.training
        module.eval()
        try:
            with torch.no_grad(), self._meanwhile():
                yield
        finally:
            module.train(trained)
        if reshard:
            self._model.reshard()
