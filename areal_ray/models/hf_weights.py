"""First weights into a sharded model, each rank reading what it needs; and Hugging Face directories, found."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from areal_ray.distributed import Ranks
from areal_ray.models.lazy_tensor import Box, part_of, windows

if TYPE_CHECKING:
    from areal_ray.models.weight_source import WeightSource

_WINDOW = 64 << 20  # bytes of a parameter that are put together at a time

# Told of what is read: the name of a weight, the tensor that it fills a part of, the box in the whole, the values.
Seen = Callable[[str, torch.Tensor, Box, torch.Tensor], None]


def resolve(path: str) -> str:
    """The directory of a model: itself, or the hub's, downloaded once per machine.

    Raises:
        ValueError: if there is no such model, or it has no safetensors.
    """
    if not os.path.isdir(path):
        from huggingface_hub import snapshot_download

        try:
            path = snapshot_download(path, allow_patterns=["*.safetensors", "*.json"])
        except (OSError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise ValueError(f"{path!r} is no directory, and the hub does not give it: {text}") from None
    if not glob.glob(os.path.join(path, "*.safetensors")):
        raise ValueError(f"there are no safetensors files in {path}")
    return path


def load_weights(
    source: WeightSource,
    model: nn.Module,
    blank: nn.Module,
    ranks: Ranks,
    into: Iterable[tuple[str, torch.Tensor]] | None = None,
    seen: Seen = lambda *_: None,
) -> None:
    """Fill a sharded model in place, each rank reading what it needs, whatever the precision in the files.

    Beyond its part a rank has a few windows of 64 MB in memory, and one head of a layer where rotary weights are
    permuted. A collective.

    Args:
        source: of the weights; what it lacks, as it may, is left alone.
        model: with memory; its non-persistent buffers are left alone.
        blank: the same on the meta device, unsharded; it must not be used for anything else afterwards.
        ranks: all ranks.
        into: names of weights in `blank`, and tensors of the model that take them. Default: all, by the same names.
        seen: told of every part that this rank reads.

    Raises:
        RankError: on every rank, if one of them could not read.
        ValueError: on every rank, if the weights are those of another model.
    """
    with source.lock() if ranks.rank == 0 else nullcontext():
        weights = source.fit(blank, ranks).weights
        ranks.all_or_raise(lambda: _read(weights, weights_of(model).items() if into is None else into, seen))


def _read(weights: Mapping[str, torch.Tensor], into: Iterable[tuple[str, torch.Tensor]], seen: Seen) -> None:
    for name, tensor in into:
        if name in weights:
            fill([(weights[name], tensor)], partial(seen, name, tensor))


def fill(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], seen: Callable[[Box, torch.Tensor], None] = lambda *_: None
) -> None:
    """Copy this rank's parts of stored tensors, the first of each pair, into the (sharded) second, some MB at a time.

    Args:
        pairs: of the same shape.
        seen: told of the box in the whole, and the values, of every part that is read.
    """
    for stored, tensor in pairs:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        firsts = offsets(tensor)
        for window in windows(tuple((0, size) for size in local.shape), local.itemsize, _WINDOW):
            box = tuple((begin + at, end + at) for (begin, end), at in zip(window, firsts, strict=True))
            values = part_of(stored, box)
            part_of(local, window).copy_(values)
            seen(box, values)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, each once, and persistent buffers, by name."""
    weights: dict[str, torch.Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    skipped = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return weights | {name: buffer for name, buffer in model.named_buffers() if name not in skipped}


def offsets(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where this rank's part of a DTensor begins, in each dimension."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    (chunk,) = tensor.__create_chunk_list__()  # DCP's protocol
    return tuple(chunk.offsets)
