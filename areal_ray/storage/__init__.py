"""Durable files, local or in S3, behind one protocol. Imports nothing of this package."""

from areal_ray.storage.base import Sink, Storage
from areal_ray.storage.local import LocalStorage
from areal_ray.storage.open import storage_at

__all__ = ["LocalStorage", "Sink", "Storage", "storage_at"]
