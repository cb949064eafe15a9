"""Weights from a Hugging Face directory (safetensors with an index), each rank reading what it needs."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from areal_ray.distributed import Ranks
from areal_ray.models.conversion import to_module
from areal_ray.models.lazy_tensor import Box, part_of, windows
from areal_ray.models.safetensors_files import opened

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


def stored_weights(path: str, blank: nn.Module, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every weight of a model, by name, as it is put together from a directory's; not read yet.

    Args:
        path: for messages.
        blank: the model on the meta device, unsharded. It must not be used for anything else afterwards.
        stored: what the directory has, by name, see `safetensors_files.opened`.

    Raises:
        ValueError: if weights are missing, have other shapes, or are more than the model takes.
    """
    wanted = weights_of(blank)
    names: dict[int, list[str]] = {}  # of each parameter; a tied one has several, and is stored under any of them
    for name, parameter in blank.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    aliases = {group[0]: group for group in names.values()}
    converted = to_module(blank, stored)
    found, problems = dict[str, torch.Tensor](), list[str]()
    for name, tensor in wanted.items():
        there = [converted.weights[each] for each in aliases.get(name, [name]) if each in converted.weights]
        if not there:
            if not any(problem.startswith(f"{name} ") for problem in converted.problems):
                problems.append(f"{name} is missing")
        elif there[0].shape != tensor.shape:
            problems.append(f"{name} is {tuple(there[0].shape)} in it and {tuple(tensor.shape)} here")
        else:
            found[name] = there[0]
    problems += converted.problems
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"the weights in {path} do not fit this model: {'; '.join(problems[:8])}{more}")
    return found


def load_weights(
    path: str,
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
        path: a directory of safetensors files.
        model: with memory; its non-persistent buffers are left alone.
        blank: the same on the meta device, unsharded; it must not be used for anything else afterwards.
        ranks: all ranks.
        into: names of weights in `blank`, and tensors of the model that take them. Default: all, by the same names.
        seen: told of every part that this rank reads.

    Raises:
        RankError: on every rank, if one of them could not read.
        ValueError: on every rank, if the weights are those of another model.
    """
    stored = ranks.all_or_raise(lambda: opened(path))
    weights = stored_weights(path, blank, stored)

    def read() -> None:
        for name, tensor in weights_of(model).items() if into is None else into:
            fill([(weights[name], tensor)], partial(seen, name, tensor))

    ranks.all_or_raise(read)


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
