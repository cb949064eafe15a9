"""Fingerprint of a sharded model's weights: the same for any number of ranks and any mesh."""

from __future__ import annotations

import itertools
import json

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.tensor import DTensor

from areal_ray.models.hf_weights import weights_of

_BLOCK = 1 << 22  # elements that are hashed at a time
# Odd numbers of 64 bits, as Python's signed ones: those of splitmix64 (Steele, Lea, Flood 2014) and MurmurHash3.
_PLACE, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A hash of all weights, of their names, shapes and number formats. A collective.

    Every element is hashed with its place in the whole tensor, and the hashes are added up modulo 2^64: who holds which
    part makes no difference. It is no protection against somebody who looks for other weights of the same hash. Each
    rank goes through its own part once, some ten operations an element, in 100 MB of memory beside it; then 16 bytes a
    tensor are summed over all ranks, whatever their number.

    Args:
        model: with its weights, sharded or not; without a process group all of it is here.
    """
    weights = weights_of(model)
    sums = torch.stack([_sum(tensor) for tensor in weights.values()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    about = []
    for (name, tensor), (total, elements) in zip(weights.items(), sums.tolist(), strict=True):
        assert elements == tensor.numel(), f"{name}: {elements} of {tensor.numel()} elements are counted"
        about.append((name, list(tensor.shape), str(tensor.dtype), total))
    return xxhash.xxh3_128_hexdigest(json.dumps(sorted(about)).encode())


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the hashes of this rank's elements, and their number; 0 of those that are another one's to count."""
    local, offsets = tensor, (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        counts = _is_first_copy(tensor) and local.numel() > 0
        if counts:
            (chunk,) = tensor.__create_chunk_list__()  # DCP's protocol
            offsets = tuple(chunk.offsets)
    else:
        counts = not dist.is_initialized() or dist.get_rank() == 0
    total = torch.zeros(2, dtype=torch.int64, device=local.device)
    if counts:
        total[0] = torch.stack(_block_sums(local.detach().contiguous(), offsets, tuple(tensor.shape))).sum()
        total[1] = local.numel()
    return total


def _block_sums(local: torch.Tensor, offsets: tuple[int, ...], shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Sums of the hashes of some rows at a time."""
    if not local.ndim:
        local, offsets, shape = local[None], (0,), (1,)
    strides = [1, *itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b)][::-1]
    bits = local.view(_BITS[local.itemsize])
    # Places within a row of the first dimension, the same for all of them.
    inner = torch.zeros((), dtype=torch.int64, device=local.device)
    for offset, size, stride in zip(offsets[1:], local.shape[1:], strides[1:], strict=True):
        inner = inner[..., None] + (offset + torch.arange(size, device=local.device)) * stride
    step = max(1, _BLOCK // max(1, inner.numel()))
    sums = []
    for first in range(0, len(local), step):
        rows = bits[first : first + step].to(torch.int64)
        begins = (offsets[0] + first + torch.arange(len(rows), device=local.device)) * strides[0]
        place = (begins.view(-1, *[1] * inner.ndim) + inner + 1) * _PLACE
        mixed = (rows ^ place) * _FIRST
        mixed = (mixed ^ (mixed >> 29)) * _SECOND
        sums.append((mixed ^ (mixed >> 32)).sum())
    return sums


def _is_first_copy(tensor: DTensor) -> bool:
    """Whether this rank is the first of those that hold the same elements.

    What a tensor group does not split lies on a mesh without it, each of its ranks having one of its own: of these the
    one with rank 0 counts.
    """
    mesh = tensor.device_mesh
    coordinates = mesh.get_coordinate()
    assert coordinates is not None
    copies = [at for at, placed in zip(coordinates, tensor.placements, strict=True) if placed.is_replicate()]
    return bool((mesh.mesh == 0).any()) and not any(copies)
