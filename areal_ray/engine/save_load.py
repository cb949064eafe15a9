"""An engine's state to a directory and back, as `dcp` or `hf`."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from areal_ray import models
from areal_ray.checkpoint import StoredState, load, save
from areal_ray.config import Config, ModelConfig
from areal_ray.distributed import Ranks
from areal_ray.engine.base import SaveLoadMeta
from areal_ray.engine.state import DCPState
from areal_ray.models import conversion, hf_weights, safetensors_files
from areal_ray.models.adapters.files import check_alone, read_adapter, write_adapter
from areal_ray.models.lazy_tensor import stored_tensors
from areal_ray.models.weight_source import of_directory
from areal_ray.storage import LocalStorage

_SHARD_BYTES = 5 << 30
_PARTS = "sharded"  # the parts of the ranks, until the files are made of them


def save_engine(meta: SaveLoadMeta, config: Config, state: DCPState, info: Mapping[str, Any], ranks: Ranks) -> None:
    """Save as `FSDPEngine.save` does. A collective.

    Args:
        meta: where and how.
        config: for `hf`, what config.json says of the model, or adapter_config.json of the adapter.
        state: everything; parts of it are left out as `meta` says.
        info: for the manifest.
        ranks: all ranks.
    """
    directory = LocalStorage(meta.path)
    if meta.weight_format == "dcp":
        ranks.on_rank_zero(lambda: _make_room(directory.location))
        save(directory, {"engine": state if meta.with_optim else state.weights()}, info, ranks)
    else:
        if state.adapted is not None:
            _save_adapter(directory, config, state.adapted, state, ranks)
        else:
            _save_weights(directory, config.model, state, ranks)
        if state.adapted is None and (architecture := models.architecture(config.model)) is not None:
            ranks.on_rank_zero(lambda: directory.replace("config.json", json.dumps(architecture, indent=2).encode()))
        if meta.with_optim:
            save(directory.sub("optim"), {"engine": state.without_weights()}, info, ranks)
    if meta.tokenizer is not None:
        ranks.on_rank_zero(lambda: meta.tokenizer.save_pretrained(directory.location) and None)


def _save_weights(directory: LocalStorage, model: ModelConfig, state: DCPState, ranks: Ranks) -> None:
    """Write the weights so that `from_pretrained` reads them: each rank its part, and then some of the files.

    No rank gathers the model; while the files are written, it lies on the disk twice.
    """
    ranks.on_rank_zero(lambda: _clear(directory))
    parts = directory.sub(_PARTS)
    save(parts, {"engine": state.weights()}, {}, ranks)

    def write() -> dict[str, Any]:
        stored = stored_tensors(StoredState(parts), "engine.model.")
        weights = conversion.to_files(models.build_model(model), stored)
        return safetensors_files.write(directory, weights, _SHARD_BYTES, ranks.rank, ranks.size)

    index = ranks.all_or_raise(write)
    ranks.on_rank_zero(lambda: safetensors_files.write_index(directory, index))
    ranks.on_rank_zero(lambda: shutil.rmtree(parts.location))


def _save_adapter(
    directory: LocalStorage, config: Config, adapted: models.Adapted, state: DCPState, ranks: Ranks
) -> None:
    """Write the adapter's directory. Rank 0 does: it is small."""
    check_alone(config.model.path, config.model.merge_adapter)
    ranks.on_rank_zero(lambda: _clear(directory))
    parts = directory.sub(_PARTS)
    save(parts, {"engine": state.weights()}, {}, ranks)

    def write() -> None:
        blank, _ = models.build_adapted(config.model, config.adapter)
        write_adapter(directory, blank, adapted, stored_tensors(StoredState(parts), "engine.model."), config.model.path)
        shutil.rmtree(parts.location)

    ranks.on_rank_zero(write)


def load_engine(meta: SaveLoadMeta, config: Config, state: DCPState, ranks: Ranks) -> None:
    """Load as `FSDPEngine.load` does. A collective."""
    directory = LocalStorage(meta.path)
    if meta.weight_format == "dcp":
        if meta.with_optim:
            load(directory, {"engine": state}, ranks)
        else:
            load(directory, {"engine": state.weights()}, ranks, part=True)
            state.reset_averages()
        return
    if state.adapted is not None:
        blank, _ = models.build_adapted(config.model, config.adapter)
        read_adapter(directory.location, blank, state.adapted, hf_weights.weights_of(state.model), ranks)
    else:
        hf_weights.load_weights(of_directory(directory.location), state.model, models.build_model(config.model), ranks)
    if meta.with_optim:
        load(directory.sub("optim"), {"engine": state.without_weights()}, ranks)
    else:
        state.reset_averages()


def _clear(directory: LocalStorage) -> None:
    """Remove what an earlier save has left: it would be taken for a part of the new one."""
    for part in (_PARTS, "optim"):
        shutil.rmtree(os.path.join(directory.location, part), ignore_errors=True)
    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for old in glob.glob(os.path.join(glob.escape(directory.location), pattern)):
            os.remove(old)
    os.makedirs(directory.location, exist_ok=True)


def _make_room(path: str) -> None:
    """Make the parents of a directory, and take it away if it is there and empty: a save makes it anew."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.isdir(path) and not os.listdir(path):
        os.rmdir(path)
