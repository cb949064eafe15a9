"""The saved state as one tree: tensors by their names in the model, everything else as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_here(tensor: torch.Tensor) -> bool:
    """Whether this rank is one of those that the tensor is spread over."""
    return not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is not None


def box_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and length of this rank's part of a DTensor, in each dimension; of any other tensor the whole.

    Raises:
        ValueError: if the DTensor is a sum that was not made yet.
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()  # DCP's protocol
    return tuple(chunk.offsets), tuple(chunk.sizes)


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


def paths(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """The keys on the way to each tensor of a tree, by its dotted path, from which they cannot be told."""
    found: dict[str, tuple[str, ...]] = {}
    for key, value in tree.items():
        path = (*above, key)
        if isinstance(value, torch.Tensor):
            found[".".join(path)] = path
        elif isinstance(value, Mapping):
            found.update(paths(value, path))
    return found


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
            its type fails when it is saved, not when a run is lost.
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
