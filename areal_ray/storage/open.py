"""The storage that a path names."""

from __future__ import annotations

from collections.abc import Mapping

from areal_ray.storage.base import Storage
from areal_ray.storage.local import LocalStorage


def storage_at(path: str, s3: Mapping[str, str | None] | None = None) -> Storage:
    """The storage that a user's path names.

    Args:
        path: of a directory, or s3://bucket/prefix.
        s3: endpoint, region and credentials for the latter, see `S3Storage`.

    Raises:
        ValueError: for a scheme that is not supported, or if its library is missing.
    """
    scheme, separator, _ = path.partition("://")
    if not separator:
        return LocalStorage(path)
    if scheme != "s3":
        raise ValueError(f"{scheme}:// is not supported: it must be a path that every node sees, or s3://bucket/prefix")
    try:
        from areal_ray.storage.s3 import S3Storage

        return S3Storage(path, s3)
    except ModuleNotFoundError as error:
        raise ValueError(f"s3:// needs packages that are not installed ({error.name}): areal_ray[s3]") from None
