"""Weights to and from a Hugging Face directory (safetensors with an index), sharded on the way."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

_SHARD_BYTES = 5 << 30
_PARTS = "sharded"  # torch's name for the parts of the ranks, which are then put together


def prepare(path: str) -> None:
    """Make a directory ready to be saved to: whatever an earlier save left there would be put together with the new."""
    for part in (_PARTS, "optim"):
        shutil.rmtree(os.path.join(path, part), ignore_errors=True)
    for old in glob.glob(os.path.join(path, "*.safetensors")) + glob.glob(
        os.path.join(path, "*.safetensors.index.json")
    ):
        os.remove(old)
    os.makedirs(path, exist_ok=True)


def save_weights(path: str, weights: dict[str, torch.Tensor]) -> None:
    """Write weights so that `from_pretrained` reads them. A collective; on a file system that all ranks see.

    Each rank writes its part, then the parts are put together file by file; no rank gathers the whole model.

    Args:
        path: directory, see `prepare`.
        weights: parameters by name, DTensors or plain.
    """
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


def shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight in a directory of safetensors files."""
    saved = HuggingFaceStorageReader(path).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in saved.items()}  # type: ignore[union-attr]


def check_fit(path: str, weights: dict[str, torch.Tensor], saved: dict[str, tuple[int, ...]]) -> None:
    """Compare what a directory holds with what is wanted from it.

    Raises:
        ValueError: if it lacks weights, or has them in other shapes.
    """
    problems = [f"{name} is missing" for name in sorted(set(weights) - set(saved))]
    for name in sorted(set(weights) & set(saved)):
        if saved[name] != tuple(weights[name].shape):
            problems.append(f"{name} is {saved[name]} in it and {tuple(weights[name].shape)} here")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"the weights in {path} do not fit this model: {'; '.join(problems[:8])}{more}")


def load_weights(path: str, weights: dict[str, torch.Tensor]) -> None:
    """Fill weights in place from the safetensors files in a directory, each rank reading what it needs. A collective.

    Raises:
        RuntimeError: on every rank, if one of them could not read.
    """
    with _plain_errors():
        load(dict(weights), storage_reader=HuggingFaceStorageReader(path))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """torch's CheckpointException is no Exception, and escapes whoever wants to hear of errors."""
    try:
        yield
    except CheckpointException as error:
        text = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
        raise RuntimeError(text) from error
