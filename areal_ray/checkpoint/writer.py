"""Saving: every rank its part, then the metadata, then the manifest."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint.manifest import MANIFEST, METADATA, STATE, FileRecord, Manifest
from areal_ray.checkpoint.shards import write_shard, write_small
from areal_ray.checkpoint.state import flatten, to_json
from areal_ray.ranks import Ranks
from areal_ray.storage import Storage


def save(directory: Storage, state: Mapping[str, Stateful], info: Mapping[str, Any], ranks: Ranks) -> Manifest:
    """Write a checkpoint into a new directory. A collective; returns when it is durable and committed.

    The order is what makes it safe to be killed at any moment: the directory must be new, shards are made durable, then
    `.metadata`, then the manifest, without which nobody takes the directory for a checkpoint.

    Args:
        directory: must not exist.
        state: what to save; tensors (plain ones equal on all ranks, DTensors in parts) and plain JSON values.
        info: what the manifest says about this save.
        ranks: all ranks of the job.

    Returns:
        The manifest, on every rank.

    Raises:
        RankError: on every rank, if any of them could not write.
    """
    tensors, values = flatten({name: part.state_dict() for name, part in state.items()})
    ranks.on_first(directory.make)
    planner, plans, metadata = _plan(tensors, ranks)
    mine = plans[ranks.rank]
    name = f"shard-{ranks.rank:05d}.distcp"  # a number among shards; nothing on loading depends on who wrote it

    def write() -> tuple[Any, FileRecord] | None:
        if not mine.items:
            return None
        items = ((item.index, planner.resolve_data(item)) for item in mine.items)
        return write_shard(directory, name, items)  # type: ignore[arg-type]

    written = ranks.together(write)
    return ranks.on_first(lambda: _commit(directory, metadata, written, values, info))


def _plan(tensors: dict[str, torch.Tensor], ranks: Ranks) -> tuple[DefaultSavePlanner, list[SavePlan], Metadata]:
    """Who writes what: DTensors where they lie, replicated tensors once."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, is_coordinator=ranks.rank == 0)
    local = planner.create_local_plan()
    plans, metadata = planner.create_global_plan(ranks.gather(local))
    planner.finish_plan(plans[ranks.rank])
    return planner, plans, metadata


def _commit(
    directory: Storage,
    metadata: Metadata,
    written: list[tuple[Any, FileRecord] | None],
    values: dict[str, Any],
    info: Mapping[str, Any],
) -> Manifest:
    files: dict[str, FileRecord] = {}
    storage_data: dict[Any, Any] = {}
    for shard in filter(None, written):
        where, record = shard
        storage_data.update(where)
        files[next(iter(where.values())).relative_path] = record
    metadata = replace(metadata, storage_data=storage_data, planner_data=None, storage_meta=StorageMeta())
    files[STATE] = write_small(directory, STATE, to_json(values))
    files[METADATA] = write_small(directory, METADATA, pickle.dumps(metadata))
    manifest = Manifest(dict(info), files)
    write_small(directory, MANIFEST, manifest.encode())
    return manifest
