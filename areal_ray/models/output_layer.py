"""A model's output layer, and whether the model makes anything of its logits before it returns them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class NoOutputLayer(ValueError):
    """Why a model's logits cannot be computed by somebody else than the model."""


def output_layer(model: nn.Module, units: Sequence[nn.Module] = (), split: bool = False) -> nn.Linear:
    """The linear layer whose output is, as it is, the model's logits.

    Found out on a single position: with a base model that gives zeros, and a layer that gives its input.

    Args:
        model: as built, before it is sharded.
        units: its shard units; the layer must lie in none, to be gathered still when the model has returned.
        split: whether layers are split over ranks (tensor parallelism).

    Raises:
        NoOutputLayer: if there is none: a model of one's own, logits that are scaled or capped afterwards.
    """
    if split:
        raise NoOutputLayer("with engine.mesh.tensor no rank has the whole output layer")
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if find is not None else None
    if not isinstance(layer, nn.Linear):
        raise NoOutputLayer(f"{type(model).__name__} names no linear output layer")
    if any(module is layer for unit in units for module in unit.modules()):
        raise NoOutputLayer("the output layer lies in one of model.shard_units")
    states = torch.zeros(1, 1, layer.in_features)
    try:
        with _base_model_giving(model, states), returning_input(layer):
            ids = torch.zeros(1, 1, dtype=torch.long)
            output: Any = type(model).forward(model, input_ids=ids, use_cache=False)
    except Exception as error:  # noqa: BLE001  (each model expects something else of its base model)
        text = " ".join(str(error).split())[:100]
        raise NoOutputLayer(f"{type(model).__name__} does not show what it does with its logits: {text}") from None
    if output.logits.data_ptr() != states.data_ptr() or output.logits.shape != states.shape:
        raise NoOutputLayer(f"{type(model).__name__} scales or caps its logits")
    return layer


@contextmanager
def returning_input(layer: nn.Linear) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]]:
    """A context in which a layer gives its input; a list of (input, weight, bias), one for each call."""
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def forward(states: torch.Tensor) -> torch.Tensor:
        calls.append((states, layer.weight, layer.bias))
        return states

    layer.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield calls
    finally:
        del layer.forward


@contextmanager
def _base_model_giving(model: nn.Module, states: torch.Tensor) -> Iterator[None]:
    # Two names of one module, mostly; OPT's output layer is given what a decoder in its base model makes.
    both: tuple[Any, Any] = model.base_model, model.get_decoder()  # type: ignore[operator]
    inner = {id(each): each for each in both}
    if id(model) in inner:
        raise ValueError("it has no base model")
    for each in inner.values():
        each.forward = lambda *args, **kwargs: _BaseOutput(states)
    try:
        yield
    finally:
        for each in inner.values():
            del each.forward


class _BaseOutput:
    """What a base model returns, of whatever kind: hidden states, and nothing else that one may ask for."""

    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
