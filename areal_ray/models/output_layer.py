"""A model's output layer, and what the model makes of its logits before it returns them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class NoOutputLayer(ValueError):
    """Why a model's logits cannot be computed by somebody else than the model."""


@dataclass(frozen=True)
class OutputLayer:
    """The last layer of a model: its logits are `finish(layer(states))`.

    Args:
        layer: a linear one.
        finish: scales or caps logits (..., vocabulary), each position by itself; None: they are what the layer gives.
    """

    layer: nn.Linear
    finish: Callable[[torch.Tensor], torch.Tensor] | None

    @contextmanager
    def left_out(self) -> Iterator[list[torch.Tensor | None]]:
        """A context in which the model ends before its output layer.

        Gives:
            A list that is then [states, weight, bias]: what the layer was given, and what it is made of.
        """
        seen: list[torch.Tensor | None] = []

        def forward(states: torch.Tensor) -> torch.Tensor:
            seen[:] = states, self.layer.weight, self.layer.bias
            return states.new_zeros(1, 1, 1).expand(1, 1, self.layer.out_features) if self.finish else states

        with _replaced([self.layer], forward):
            yield seen


def output_layer(model: nn.Module, units: Sequence[nn.Module] = (), split: bool = False) -> OutputLayer:
    """The output layer of a model, found out by a forward pass in which all other layers are left out.

    Args:
        model: as built, before it is sharded.
        units: its shard units; the layer must lie in none, to be gathered still when the model has returned.
        split: whether layers are split over ranks (tensor parallelism).

    Raises:
        NoOutputLayer: if there is none: a model of one's own, or logits that are made in another way.
    """
    if split:
        raise NoOutputLayer("with engine.mesh.tensor no rank has the whole output layer")
    name = type(model).__name__
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if find is not None else None
    if not isinstance(layer, nn.Linear):
        raise NoOutputLayer(f"{name} names no linear output layer")
    if any(module is layer for unit in units for module in unit.modules()):
        raise NoOutputLayer("the output layer lies in one of model.shard_units")
    given = torch.linspace(-40, 40, 3 * layer.out_features).view(1, 3, layer.out_features)
    try:
        whole = _finish(model, layer, given)
        alone = torch.cat([_finish(model, layer, row) for row in given.split(1, 1)], 1)
    except Exception as error:  # noqa: BLE001  (each model expects something else of its layers)
        text = " ".join(str(error).split())[:100]
        raise NoOutputLayer(f"{name} does not show what it does with its logits: {text}") from None
    if whole.requires_grad or whole.shape != given.shape or not torch.equal(whole, alone):
        raise NoOutputLayer(f"{name} makes its logits in a way of its own")
    same = whole.data_ptr() == given.data_ptr()
    return OutputLayer(layer, None if same else lambda logits: _finish(model, layer, logits))


def _finish(model: nn.Module, layer: nn.Linear, logits: torch.Tensor) -> torch.Tensor:
    """What a model returns whose output layer gives these logits."""
    both: tuple[Any, Any] = model.base_model, model.get_decoder()  # type: ignore[operator]
    # Two names of one module, mostly; OPT's output layer is given what a decoder in its base model makes.
    inner = list({id(each): each for each in both if each is not model}.values())
    if not inner:
        raise ValueError("it has no base model")
    states = torch.zeros(1, 1, layer.in_features, device=logits.device, dtype=logits.dtype)
    ids = torch.zeros(1, 1, dtype=torch.long, device=logits.device)
    with _replaced(inner, lambda *_, **__: _BaseOutput(states)), _replaced([layer], lambda _: logits):
        output: Any = type(model).forward(model, input_ids=ids, use_cache=False)
    finished: torch.Tensor = output.logits
    return finished


@contextmanager
def _replaced(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


class _BaseOutput:
    """What a base model returns, of whatever kind: hidden states, and nothing else that one may ask for."""

    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
