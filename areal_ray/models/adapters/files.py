"""Directories of an adapter: adapter_config.json and adapter_model.safetensors, as peft has them."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import nn

from areal_ray.distributed import Ranks
from areal_ray.models.adapters.adapter import Adapted
from areal_ray.models.hf_weights import fill
from areal_ray.models.safetensors_files import opened, write_file
from areal_ray.storage import Storage

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_adapter(
    out: Storage, model: nn.Module, adapted: Adapted, trained: Mapping[str, torch.Tensor], base: str | None
) -> dict[str, torch.Tensor]:
    """Write the directory, in one process; what was written, by its name in the file.

    Args:
        out: where to.
        model: with the adapter, on the meta device.
        adapted: of it.
        trained: weights by their names there, lazy or not; what is not the adapter's is left out.
        base: directory or hub name of the base, if it has one.
    """
    own = {name: tensor for name, tensor in trained.items() if name not in adapted.base}
    tensors, config = adapted.adapter.directory(model, own, base)
    write_file(out, WEIGHTS, tensors)
    out.replace(CONFIG, json.dumps(config, indent=2).encode() + b"\n")  # last: it makes the directory one of an adapter
    return tensors


def check_alone(base: str | None, added: str | None) -> None:
    """Raise ValueError if an adapter cannot be written alone: who reads it puts it on what lies at its base's path.

    Args:
        base: directory or hub name of the base.
        added: directory of an adapter of peft whose changes the base has, too (model.merge_adapter).
    """
    if added is not None:
        text = f"the adapter was trained on {base} with the adapter in {added} added, and alone would be read on {base}"
        raise ValueError(f"{text} as it is: export the model with both in it (areal-ray ckpt export --merged)")


def read_adapter(
    path: str, model: nn.Module, adapted: Adapted, weights: Mapping[str, torch.Tensor], ranks: Ranks
) -> None:
    """Fill a sharded model's adapter with what `write_adapter` wrote, each rank its part. A collective.

    Args:
        path: of the directory.
        model, adapted: as for `write_adapter`.
        weights: live ones, by their names there.
        ranks: all ranks.

    Raises:
        RankError: on every rank, if one of them could not read.
        ValueError: on every rank, if the directory is of another adapter.
    """
    stored = ranks.all_or_raise(lambda: opened(path))
    own = {name: tensor for name, tensor in weights.items() if name not in adapted.base}
    wanted, _ = adapted.adapter.directory(model, own, None)
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - stored.keys())]
    problems += [f"{name} is unknown here" for name in sorted(stored.keys() - wanted.keys())]
    for name in wanted.keys() & stored.keys():
        if wanted[name].shape != stored[name].shape:
            problems.append(f"{name} is {tuple(stored[name].shape)} in it and {tuple(wanted[name].shape)} here")
    if problems:
        raise ValueError(f"the weights in {path} do not fit this adapter: {'; '.join(problems[:8])}")
    ranks.all_or_raise(lambda: fill([(stored[name], tensor) for name, tensor in wanted.items()]))
