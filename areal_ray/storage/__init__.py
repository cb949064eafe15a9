"""Durable files, local or in S3, behind one protocol. Imports nothing of this package."""

from areal_ray.storage.base import LeadsOut, NotAFile, Sink, Storage, is_unreadable
from areal_ray.storage.local import LocalStorage
from areal_ray.storage.obstacles import set_obstacle_aside
from areal_ray.storage.open import storage_at
from areal_ray.storage.read_ahead import read_ahead

__all__ = [
    "LeadsOut",
    "LocalStorage",
    "NotAFile",
    "Sink",
    "Storage",
    "is_unreadable",
    "read_ahead",
    "set_obstacle_aside",
    "storage_at",
]
