"""What is saved, as one tree: tensors by their names in the model, everything else as plain values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor


class DCPState(Stateful):
    """Model, optimizer and schedule as one `Stateful`, for DCP.

    The tensors in its state are the live ones (DTensors, each rank holding its part), keyed by parameter name:
    `model.<name>` and `optim.<name>.exp_avg` and so on. Loading fills them in place, without a second copy. Nothing
    names a rank, and nothing is pickled: optimizer hyperparameters come from the config, not from the checkpoint.

    After AReaL's DCPState (PR "Support PyTorch DCP for FSDP") and torch's Stateful protocol.

    Args:
        model: sharded or not; tied parameters are saved once.
        optimizer: with its state already made; None leaves it out.
        schedule: anything with state_dict and load_state_dict of plain values; None leaves it out.
        weights: False leaves the model's weights out, for when they are saved in another format.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: Stateful | None = None,
        weights: bool = True,
    ) -> None:
        self._model, self._optimizer, self._schedule, self._weights = model, optimizer, schedule, weights

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self._weights:
            state["model"] = dict(_weights(self._model))
        if self._optimizer is not None:
            names = {parameter: name for name, parameter in self._model.named_parameters()}
            state["optim"] = {names[p]: dict(values) for p, values in self._optimizer.state.items()}  # type: ignore[index]
        if self._schedule is not None:
            state["schedule"] = self._schedule.state_dict()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of the same shape; tensors that were filled in place already are left alone."""
        loaded, _ = flatten(state)
        for name, tensor in flatten(self.state_dict())[0].items():
            if local(loaded[name]).data_ptr() != local(tensor).data_ptr():
                tensor.copy_(loaded[name])
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, each once, and the buffers that belong to the state."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
    skipped = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    for name, buffer in model.named_buffers():
        if name not in skipped:
            yield name, buffer


def flatten(tree: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split a tree of nested dicts into its tensors, by dotted path, and the rest, nested as it was."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            tensors[path] = value
        elif isinstance(value, Mapping):
            below, rest = flatten(value, f"{path}.")
            tensors.update(below)
            if rest or not value:
                values[key] = rest
        else:
            values[key] = value
    return tensors, values


def merge(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with its tensors as they are and everything else taken from `values`."""
    tensors_only = {
        key: merge(value, values.get(key, {})) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if isinstance(value, Mapping | torch.Tensor)
    }
    return {**{k: v for k, v in values.items() if not isinstance(tree.get(k), torch.Tensor)}, **tensors_only}


def to_json(values: Mapping[str, Any]) -> bytes:
    """Plain values as readable JSON.

    Raises:
        TypeError: if they would not come back the same (tuples, integer keys, objects): a state that quietly changes
            its type is found when it is saved, not when a run is lost.
    """
    _check_plain(values, "state")
    return json.dumps(values, indent=2, sort_keys=True).encode()


def _check_plain(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, below in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{path}: the key {key!r} is no string, and JSON would make it one")
            _check_plain(below, f"{path}.{key}")
    elif isinstance(value, list):
        for i, below in enumerate(value):
            _check_plain(below, f"{path}[{i}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"{path}: JSON does not keep a {type(value).__name__} as it is")
