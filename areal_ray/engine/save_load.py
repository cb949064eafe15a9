"""An engine's state to a directory and back, as `dcp` or `hf`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from areal_ray import models
from areal_ray.checkpoint import load, save
from areal_ray.config import ModelConfig
from areal_ray.distributed import Ranks
from areal_ray.engine.base import SaveLoadMeta
from areal_ray.engine.state import DCPState
from areal_ray.models import hf_weights
from areal_ray.storage import LocalStorage


def save_engine(meta: SaveLoadMeta, model: ModelConfig, state: DCPState, info: Mapping[str, Any], ranks: Ranks) -> None:
    """Save as `FSDPEngine.save` does. A collective.

    Args:
        meta: where and how.
        model: for `hf`, what config.json says of it.
        state: everything; parts of it are left out as `meta` says.
        info: for the manifest.
        ranks: all ranks.
    """
    directory = LocalStorage(meta.path)
    if meta.weight_format == "dcp":
        ranks.on_rank_zero(lambda: _make_room(directory.location))
        save(directory, {"engine": state if meta.with_optim else state.weights()}, info, ranks)
    else:
        ranks.on_rank_zero(lambda: hf_weights.prepare(directory.location))
        ranks.all_or_raise(lambda: hf_weights.save_weights(directory.location, hf_weights.weights_of(state.model)))
        if (architecture := models.architecture(model)) is not None:
            ranks.on_rank_zero(lambda: directory.replace("config.json", json.dumps(architecture, indent=2).encode()))
        if meta.with_optim:
            save(directory.sub("optim"), {"engine": state.without_weights()}, info, ranks)
    if meta.tokenizer is not None:
        ranks.on_rank_zero(lambda: meta.tokenizer.save_pretrained(directory.location) and None)


def load_engine(meta: SaveLoadMeta, state: DCPState, ranks: Ranks) -> None:
    """Load as `FSDPEngine.load` does. A collective."""
    directory = LocalStorage(meta.path)
    if meta.weight_format == "dcp":
        if meta.with_optim:
            load(directory, {"engine": state}, ranks)
        else:
            load(directory, {"engine": state.weights()}, ranks, part=True)
        return
    hf_weights.load_weights(directory.location, state.model, ranks)
    if meta.with_optim:
        load(directory.sub("optim"), {"engine": state.without_weights()}, ranks)


def _make_room(path: str) -> None:
    """Make the parents of a directory, and take it away if it is there and empty: a save makes it anew."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.isdir(path) and not os.listdir(path):
        os.rmdir(path)
