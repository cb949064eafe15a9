"""A checkpoint as a Hugging Face directory: config, tokenizer, sharded safetensors with an index.

In one process and with a few tensors in memory at a time, from any storage to any storage.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from dataclasses import dataclass

from areal_ray import models
from areal_ray.checkpoint.read_lock import read_lock
from areal_ray.checkpoint.reader import StoredState
from areal_ray.data import build_tokenizer
from areal_ray.models import conversion, safetensors_files
from areal_ray.models.lazy_tensor import stored_tensors
from areal_ray.storage import Storage
from areal_ray.tools.export_adapter import SavedAdapter

_PREFIX = "engine.model."  # of the weights among the tensors of a checkpoint


@dataclass(frozen=True)
class Exported:
    """The outcome of an export."""

    files: list[str]
    tensors: int
    total_bytes: int


def export(
    checkpoint: Storage,
    out: Storage,
    shard_bytes: int = 5 << 30,
    tokenizer: str | None = None,
    merged: bool = False,
    base: str | None = None,
    adapter: models.Adapter | None = None,
) -> Exported:
    """Write the weights of a checkpoint so that `AutoModelForCausalLM.from_pretrained` reads them, bit for bit.

    Of a run with an adapter it is the adapter's directory, as peft reads it, or the model with the adapter merged.

    Args:
        checkpoint: a committed checkpoint.
        out: a directory with nothing in it.
        shard_bytes: largest file, unless one tensor is larger.
        tokenizer: as data.tokenizer of the config, "none" for none. Default that of the run if it is the one of bytes:
            what a checkpoint names is nothing to load from a hub or a path unasked. An adapter's directory has one only
            if it is given.
        merged: of an adapter: into its base.
        base: of a merged one: directory or hub name of the base; None if it was drawn from the run's seed.
        adapter: a user's own, as the run had it; for lora it is made anew.

    Raises:
        FileExistsError: if there is something in `out`.
        ValueError: if the checkpoint is not of a transformers model, or its tokenizer or base is not given or cannot be
            loaded.
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
        has_adapter = "adapter" in state.manifest.info
        if (merged or base) and not has_adapter:
            raise ValueError(f"{checkpoint.location} has no adapter: it is exported without --merged and --base")
        saved = SavedAdapter(state.manifest.info, adapter) if has_adapter else None
        if saved is not None and not merged:
            out.ensure()
            _write_tokenizer(out, tokenizer or "none")
            tensors = saved.write(out, stored_tensors(state, _PREFIX))
            return Exported(sorted(out.names()), len(tensors), sum(each.nbytes for each in tensors.values()))
        named = state.manifest.info.get("tokenizer") or "none"
        if tokenizer is None and named not in ("bytes", "none"):
            raise ValueError(
                f"the run's tokenizer was {named!r}, and what a checkpoint names is not loaded unasked: "
                f"give --tokenizer {shlex.quote(str(named))}, or --tokenizer none"
            )
        stored = stored_tensors(state, _PREFIX)
        weights = stored if saved is None else saved.merged(stored, base)
        out.ensure()
        _write_tokenizer(out, tokenizer or named)
        weights = conversion.to_files(models.build_saved(config), weights)
        index = safetensors_files.write(out, weights, shard_bytes)
    safetensors_files.write_index(out, index)
    out.replace("config.json", _json(config))  # last: without it nobody takes the directory for a model
    return Exported(sorted(out.names()), len(weights), index["metadata"]["total_size"])


def _write_tokenizer(out: Storage, name: str) -> None:
    if name == "none":
        return
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer(name).save(folder)
        for file in sorted(os.listdir(folder)):
            with open(os.path.join(folder, file), "rb") as stream:
                out.replace(file, stream.read())


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
