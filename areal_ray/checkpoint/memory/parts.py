"""Parts of tensors: which box of each tensor a rank has, as text that a rank of another size of the job can read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from areal_ray.checkpoint.format.shard_file import ShardImage
from areal_ray.checkpoint.tree import box_of

_SIZES = ("world_size", "mesh")  # of a run's description: what may be another one when a copy is restored


@dataclass(frozen=True)
class Part:
    """One rank's part of a tensor.

    Args:
        name, dtype, shape: of the whole tensor.
        offsets, lengths: of the box of it that this is, by dimension.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return 0 in self.lengths


def parts_of(tensors: Mapping[str, torch.Tensor]) -> list[Part]:
    """This rank's parts of these tensors, in their order: boxes of DTensors, all of the others."""
    return [Part(name, tensor.dtype, tuple(tensor.shape), *box_of(tensor)) for name, tensor in tensors.items()]


def encode(parts: Sequence[Part]) -> str:
    """Parts as text, some hundred bytes each."""
    return json.dumps([[p.name, str(p.dtype), p.shape, p.offsets, p.lengths] for p in parts])


def decode(text: str) -> list[Part]:
    """Parts from the text of `encode`."""
    return [
        Part(name, getattr(torch, dtype.removeprefix("torch.")), tuple(shape), tuple(offsets), tuple(lengths))
        for name, dtype, shape, offsets, lengths in json.loads(text)
    ]


def digest(info: Mapping[str, Any], parts: Sequence[Part]) -> str:
    """Digest of all that must be the same for a copy to be restored: the run, and the tensors as wholes."""
    same = {key: value for key, value in info.items() if key not in _SIZES}
    wholes = sorted((part.name, part.shape, str(part.dtype)) for part in parts)
    return xxhash.xxh3_128_hexdigest(json.dumps([same, wholes], sort_keys=True).encode())


def filled_image(file: int, parts: Sequence[Part]) -> ShardImage:
    """The image that another process has filled with these parts; the file descriptor stays the caller's."""
    return ShardImage("", [torch.empty(part.lengths, dtype=part.dtype, device="meta") for part in parts], file)
