"""Weights to and from a Hugging Face directory (safetensors with an index), sharded on the way."""

from __future__ import annotations

import os
import shutil

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

_SHARD_BYTES = 5 << 30


def save_weights(path: str, weights: dict[str, torch.Tensor]) -> None:
    """Write weights so that `from_pretrained` reads them. A collective; on a file system that all ranks see.

    Each rank writes its part, then the parts are put together file by file; no rank gathers the whole model.

    Args:
        path: directory, made if needed.
        weights: parameters by name, DTensors or plain.
    """
    os.makedirs(path, exist_ok=True)
    file_of, used = {}, 0
    for name, tensor in weights.items():
        used += tensor.numel() * tensor.itemsize
        file_of[name] = used // _SHARD_BYTES + 1
    save(
        dict(weights),
        storage_writer=HuggingFaceStorageWriter(
            path, fqn_to_index_mapping=file_of, save_distributed=True, enable_consolidation=True
        ),
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(os.path.join(path, "sharded"), ignore_errors=True)  # the parts, now in the files above


def load_weights(path: str, weights: dict[str, torch.Tensor]) -> None:
    """Fill weights in place from the safetensors files in a directory, each rank reading what it needs.

    Raises:
        ValueError: if the directory lacks some of them.
    """
    reader = HuggingFaceStorageReader(path)
    saved = reader.read_metadata().state_dict_metadata
    missing = sorted(set(weights) - set(saved))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights, the first of them {', '.join(missing[:4])}")
    load(dict(weights), storage_reader=HuggingFaceStorageReader(path))
