"""Weights to and from a Hugging Face directory (safetensors with an index), sharded on the way."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save

from areal_ray.distributed import Ranks

_SHARD_BYTES = 5 << 30
_PARTS = "sharded"  # torch's name for the parts of the ranks, which are then put together


def prepare(path: str) -> None:
    """Make a directory ready to be saved to: whatever an earlier save left there would be put together with the new."""
    for part in (_PARTS, "optim"):
        shutil.rmtree(os.path.join(path, part), ignore_errors=True)
    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for old in glob.glob(os.path.join(path, pattern)):
            os.remove(old)
    os.makedirs(path, exist_ok=True)


def save_weights(path: str, weights: dict[str, torch.Tensor]) -> None:
    """Write weights so that `from_pretrained` reads them. A collective; on a file system that all ranks see.

    Each rank writes its part, then the parts are put together file by file; no rank gathers the whole model.

    Args:
        path: directory, see `prepare`.
        weights: parameters by name, DTensors or plain.

    Raises:
        ValueError: for a scalar weight, which torch's writer would put down as zero.
    """
    if scalars := [name for name, tensor in weights.items() if tensor.ndim == 0]:
        raise ValueError(f"{scalars[0]} is a scalar; use `areal-ray ckpt export`, which writes it as it is")
    file_of, used = {}, 0
    for name, tensor in weights.items():
        used += tensor.numel() * tensor.itemsize
        file_of[name] = used // _SHARD_BYTES + 1
    with _plain_errors():
        save(
            dict(weights),
            storage_writer=HuggingFaceStorageWriter(
                path, fqn_to_index_mapping=file_of, save_distributed=True, enable_consolidation=True
            ),
        )
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(os.path.join(path, _PARTS), ignore_errors=True)  # the parts, now in the files above


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


def shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight in a directory of safetensors files; those of its index, if it has one."""
    saved = HuggingFaceStorageReader(path).read_metadata().state_dict_metadata
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.isfile(index):  # some models lie there twice, under other names
        with open(index) as file:
            listed = json.load(file)["weight_map"]
        if lost := sorted(set(listed) - set(saved)):
            raise ValueError(f"{path}: the index lists {lost[0]}, but no file has it")
        saved = {name: saved[name] for name in listed}
    return {name: tuple(entry.size) for name, entry in saved.items()}  # type: ignore[union-attr]


def stored_names(path: str, model: nn.Module, saved: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """For every weight of a model the name that it has in a directory.

    Names differ where a parameter is tied to another, and where the files are of the model without its head.

    Args:
        path: for messages.
        model: whose weights are wanted.
        saved: shapes by name, see `shapes`.

    Raises:
        ValueError: if weights are missing, have other shapes, or are more than the model takes.
    """
    wanted = weights_of(model)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    same = {group[0]: group for group in aliases.values()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for name in wanted:
        names = same.get(name, [name])
        names = names + [other.removeprefix(prefix) for other in names]
        found |= {name: next((other for other in names if other in saved), "")}
    problems = [f"{name} is missing" for name in sorted(wanted) if not found[name]]
    for name, tensor in sorted(wanted.items()):
        if found[name] and saved[found[name]] != tuple(tensor.shape):
            problems.append(f"{name} is {saved[found[name]]} in it and {tuple(tensor.shape)} here")
    known = set(found.values()) | {name for group in aliases.values() for name in group}
    known |= {name for name, _ in model.named_buffers()}
    known |= {name.removeprefix(prefix) for name in known}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []]
    spare = [name for name in sorted(set(saved) - known) if not any(pattern.search(name) for pattern in ignored)]
    problems += [f"{name} is unknown here" for name in spare]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"the weights in {path} do not fit this model: {'; '.join(problems[:8])}{more}")
    return found


def load_weights(path: str, model: nn.Module, ranks: Ranks) -> None:
    """Fill a sharded model in place, each rank reading what it needs, whatever the precision in the files.

    A collective.

    Args:
        path: a directory of safetensors files.
        model: with memory; its non-persistent buffers are left alone.
        ranks: all ranks.

    Raises:
        RankError: on every rank, if one of them could not read.
        ValueError: on every rank, if the weights are those of another model.
    """
    names = stored_names(path, model, ranks.on_rank_zero(lambda: shapes(path)))

    def read() -> None:
        weights = {names[name]: tensor for name, tensor in weights_of(model).items()}
        reader = HuggingFaceStorageReader(path)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        planner.set_up_planner(weights, metadata, is_coordinator=False)
        # No collective: a load plan needs nobody else's, and one rank's error is told to all as it is.
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()

    ranks.all_or_raise(read)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, each once, and persistent buffers, by name."""
    weights: dict[str, torch.Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    skipped = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return weights | {name: buffer for name, buffer in model.named_buffers() if name not in skipped}


@contextmanager
def _plain_errors() -> Iterator[None]:
    """torch's CheckpointException is no Exception, and escapes whoever wants to hear of errors."""
    try:
        yield
    except CheckpointException as error:
        text = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
        raise RuntimeError(text) from error
