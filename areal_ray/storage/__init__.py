"""Durable files, local or in S3, behind one protocol. Imports nothing of this package."""

from areal_ray.storage.base import Sink, Storage
from areal_ray.storage.local import LocalStorage
from areal_ray.storage.open import storage_at
from areal_ray.storage.read_ahead import read_ahead

__all__ = ["LocalStorage", "Sink", "Storage", "read_ahead", "storage_at"]
