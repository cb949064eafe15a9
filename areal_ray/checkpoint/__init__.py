"""Stateful objects to a directory and back: sharded over ranks, committed whole, checked on the way in.

Knows `Stateful` and `Storage`, nothing of models, loops or Ray.
"""

from areal_ray.checkpoint.catalog import Catalog, Entry
from areal_ray.checkpoint.format.manifest import CheckpointDamaged, Manifest, read_manifest
from areal_ray.checkpoint.memory import Copy, MemoryCopies, Partners
from areal_ray.checkpoint.reader import StoredState, load
from areal_ray.checkpoint.writer import AsyncWriter, CheckpointWriter, SyncWriter, save

__all__ = [
    "AsyncWriter",
    "Catalog",
    "CheckpointDamaged",
    "CheckpointWriter",
    "Copy",
    "Entry",
    "Manifest",
    "MemoryCopies",
    "Partners",
    "StoredState",
    "SyncWriter",
    "load",
    "read_manifest",
    "save",
]
