"""A checkpoint as a Hugging Face directory: config, tokenizer, sharded safetensors with an index.

In one process and with a few tensors in memory at a time, from any storage to any storage.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from dataclasses import dataclass

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from areal_ray.checkpoint.read_lock import read_lock
from areal_ray.checkpoint.reader import StoredState
from areal_ray.data import build_tokenizer
from areal_ray.storage import Storage

_PREFIX = "engine.model."  # of the weights among the tensors of a checkpoint
# https://github.com/huggingface/safetensors#format
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Exported:
    """The outcome of an export."""

    files: list[str]
    tensors: int
    total_bytes: int


def export(checkpoint: Storage, out: Storage, shard_bytes: int = 5 << 30, tokenizer: str | None = None) -> Exported:
    """Write the weights of a checkpoint so that `AutoModelForCausalLM.from_pretrained` reads them, bit for bit.

    Args:
        checkpoint: a committed checkpoint.
        out: a directory with nothing in it.
        shard_bytes: largest file, unless one tensor is larger.
        tokenizer: as data.tokenizer of the config, "none" for none. Default that of the run if it is the one of bytes:
            what a checkpoint names is nothing to load from a hub or a path unasked.

    Raises:
        FileExistsError: if there is something in `out`.
        ValueError: if the checkpoint is not of a transformers model, or its tokenizer is not given or cannot be loaded.
        CheckpointDamaged: if the bytes are not those that were written.
    """
    if out.names():
        raise FileExistsError(f"{out.location} is not empty")
    with read_lock(checkpoint):
        state = StoredState(checkpoint)
        config = state.manifest.info.get("hf_config")
        if not config:
            raise ValueError(
                f"{checkpoint.location} does not say which transformers model it is of: it cannot be exported"
            )
        named = state.manifest.info.get("tokenizer") or "none"
        if tokenizer is None and named not in ("bytes", "none"):
            raise ValueError(
                f"the run's tokenizer was {named!r}, and what a checkpoint names is not loaded unasked: "
                f"give --tokenizer {shlex.quote(str(named))}, or --tokenizer none"
            )
        out.ensure()
        _write_tokenizer(out, tokenizer or named)
        names = {name.removeprefix(_PREFIX): name for name in state.names if name.startswith(_PREFIX)}
        split = split_state_dict_into_shards_factory(
            {name: _size(state, stored) for name, stored in names.items()},
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_bytes,
        )
        for file, shard in split.filename_to_tensors.items():
            _write_shard(out, file, state, {name: names[name] for name in shard})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        out.replace("model.safetensors.index.json", _json(index))
    out.replace("config.json", _json(config))  # last: without it nobody takes the directory for a model
    return Exported(sorted(out.names()), len(names), split.metadata["total_size"])


def _write_shard(out: Storage, file: str, state: StoredState, names: dict[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, stored in names.items():
        end = offset + _size(state, stored)
        dtype = _DTYPES.get(state.dtype(stored))
        if dtype is None:
            raise ValueError(f"{name} is of {state.dtype(stored)}, which safetensors has not")
        header[name] = {"dtype": dtype, "shape": list(state.shape(stored)), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin aligned
    with out.create(file) as sink:
        sink.write(len(text).to_bytes(8, "little"))
        sink.write(text)
        for _, tensor in state.tensors(names.values()):
            sink.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _write_tokenizer(out: Storage, name: str) -> None:
    if name == "none":
        return
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer(name).save(folder)
        for file in sorted(os.listdir(folder)):
            with open(os.path.join(folder, file), "rb") as stream:
                out.replace(file, stream.read())


def _size(state: StoredState, name: str) -> int:
    return torch.Size(state.shape(name)).numel() * state.dtype(name).itemsize


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
