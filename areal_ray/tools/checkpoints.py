"""Checkpoints seen from outside: listing, inspection, digest, differences; needs no cluster and no GPU."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch

from areal_ray.checkpoint import Catalog
from areal_ray.checkpoint.format.manifest import verify
from areal_ray.checkpoint.read_lock import read_lock
from areal_ray.checkpoint.reader import StoredState
from areal_ray.storage import Storage


def listing(run: Storage) -> list[dict[str, Any]]:
    """One row for every directory that looks like a checkpoint, oldest first.

    A checkpoint that the run's index has is said to be good as it was then, see `Catalog.summaries`: whether its bytes
    are still those that were written, `check` says.
    """
    rows = []
    for found in Catalog(run).summaries():
        info = found.info
        rows.append(
            {
                "name": found.name,
                "step": found.step,
                "attempt": found.attempt,
                "bytes": found.size,
                "world_size": info.get("world_size"),
                "saved": datetime.fromtimestamp(info["time"]).isoformat(" ", "seconds") if "time" in info else None,
                "state": found.problem or "good",
            }
        )
    return rows[::-1]


def inspection(checkpoint: Storage) -> dict[str, Any]:
    """The contents of a checkpoint: where it comes from, its plain values, name, shape and type of each tensor.

    Raises:
        CheckpointDamaged: if the bytes are not those that were written.
    """
    with read_lock(checkpoint):
        state = StoredState(checkpoint)
    tensors = {name: [str(state.dtype(name)).removeprefix("torch."), list(state.shape(name))] for name in state.names}
    return {
        "info": state.manifest.info,
        "bytes": state.manifest.total_bytes,
        "files": {name: record.size for name, record in sorted(state.manifest.files.items())},
        "values": state.values,
        "tensors": tensors,
    }


def check(checkpoint: Storage) -> int:
    """Read every byte and compare it with the manifest; the number of bytes.

    Raises:
        CheckpointDamaged: for the first file that differs.
    """
    with read_lock(checkpoint):
        return verify(checkpoint).total_bytes


def digest(checkpoint: Storage) -> str:
    """SHA-256 of the logical state: every tensor whole, in the order of names, and the plain values.

    Equal for equal states, however many ranks wrote them in however many files. Times of the wall clock (`elapsed_s`)
    are no part of it.

    Raises:
        CheckpointDamaged: if the bytes are not those that were written.
    """
    with read_lock(checkpoint):
        return _digest(StoredState(checkpoint))


def _digest(state: StoredState) -> str:
    total = hashlib.sha256()
    for name, tensor in state.tensors(state.names):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    total.update(json.dumps(_without_times(state.values), sort_keys=True).encode())
    return total.hexdigest()


@dataclass(frozen=True)
class Difference:
    """A difference between two checkpoints."""

    name: str
    what: str
    max_abs: float | None = None


def differences(a: Storage, b: Storage) -> list[Difference]:
    """Everything in which two states differ, bit for bit; empty if they are the same state.

    Raises:
        CheckpointDamaged: if the bytes are not those that were written.
    """
    with read_lock(a), read_lock(b):
        return _differences(StoredState(a), StoredState(b))


def _differences(left: StoredState, right: StoredState) -> list[Difference]:
    found = [Difference(name, "only in the first") for name in sorted(set(left.names) - set(right.names))]
    found += [Difference(name, "only in the second") for name in sorted(set(right.names) - set(left.names))]
    both = sorted(set(left.names) & set(right.names))
    for (name, x), (_, y) in zip(left.tensors(both), right.tensors(both), strict=True):
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            found.append(Difference(name, f"{x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"))
        elif not torch.equal(_bits(x), _bits(y)):
            count = int((_bits(x) != _bits(y)).view(x.numel(), -1).any(dim=1).sum())
            apart = float((x.double() - y.double()).abs().max())
            found.append(Difference(name, f"{count} of {x.numel()} elements", apart))
    mine, theirs = _flat(_without_times(left.values)), _flat(_without_times(right.values))
    for name in sorted(set(mine) | set(theirs)):
        one, other = mine.get(name, "absent"), theirs.get(name, "absent")
        if one != other:
            found.append(Difference(name, f"{one} and {other}"))
    return found


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, for a comparison in which NaN equals itself and -0.0 is not 0.0."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _without_times(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_times(value) for key, value in values.items() if key != "elapsed_s"}
    return values


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
