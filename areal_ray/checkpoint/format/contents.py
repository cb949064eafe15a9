"""What a checkpoint says of itself: manifest, layout, plain values; and the tables of checksums, as they are needed."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import partial
from math import prod
from threading import Lock
from typing import Any

import torch

from areal_ray.checkpoint.format.format_1 import old_layout
from areal_ray.checkpoint.format.layout import LAYOUT, Layout
from areal_ray.checkpoint.format.manifest import (
    METADATA,
    STATE,
    CheckpointDamaged,
    Manifest,
    decode_manifest,
    parse_json,
    read_checked,
    read_manifest,
)
from areal_ray.checkpoint.format.sums import Sums, shard_name
from areal_ray.processes.file_writer import sums_name
from areal_ray.storage import Storage, read_ahead

_NO_NUMBERS = ("q", "bits")  # types of torch that have more to them than their bytes, or nothing to be done with
_TABLE_BYTES = 1 << 20  # guessed, of a table that is read ahead


def torch_dtype(name: str) -> torch.dtype:
    """A type of torch by its name.

    Raises:
        CheckpointDamaged: if there is none.
    """
    found = torch.__dict__.get(name)
    if not isinstance(found, torch.dtype) or name.startswith(_NO_NUMBERS):
        raise CheckpointDamaged(f"{LAYOUT}: this torch has no type {name!r}")
    return found


class Contents:
    """A checkpoint without its tensors.

    Args:
        manifest: of the checkpoint.
        layout: where its tensors are.
        values: the plain values, by object.
        files: names of the shard files by their numbers in the layout.
        sums: tables that are known already, by the numbers of the files.
    """

    def __init__(
        self, manifest: Manifest, layout: Layout, values: dict[str, Any], files: list[str], sums: dict[int, Sums]
    ) -> None:
        self.manifest, self.layout, self.values, self.files = manifest, layout, values, files
        self._sums, self._lock = dict(sums), Lock()

    @classmethod
    def read(cls, directory: Storage) -> list[bytes]:
        """The files that `decode` takes, verified and compressed, to be sent to other ranks.

        Raises:
            CheckpointDamaged: if one is missing or damaged.
        """
        manifest = read_manifest(directory)
        described = METADATA if manifest.format == 1 else LAYOUT
        small = [read_checked(directory, name, manifest) for name in (described, STATE)]
        found = [zlib.compress(each, 1) for each in (manifest.encode(), *small)]
        cls.decode(found)  # or all ranks would find out
        return found

    @classmethod
    def decode(cls, found: list[bytes]) -> Contents:
        """A checkpoint's contents from what `read` returns.

        Raises:
            CheckpointDamaged: if they do not fit each other.
        """
        text, described, state = map(zlib.decompress, found)
        manifest, values = decode_manifest(text), parse_json(state, STATE)
        if type(values) is not dict or not all(type(each) is dict for each in values.values()):
            raise CheckpointDamaged(f"{STATE}: not the values of objects")
        if manifest.format == 1:
            layout, sums = old_layout(manifest, described)
            _check_room(layout, manifest, METADATA)
            return cls(manifest, layout, values, list(sums), dict(enumerate(sums.values())))
        layout = Layout.decode(described)
        _check_room(layout, manifest, LAYOUT)
        cuts = {id(tensor.cut): tensor.cut for tensor in layout.tensors.values()}
        used = {number for cut in cuts.values() for number in cut.shards.tolist()}
        for name in (each(shard_name(number)) for number in sorted(used) for each in (str, sums_name)):
            if name not in manifest.files:
                raise CheckpointDamaged(f"{name}: not in the manifest")
        return cls(manifest, layout, values, [shard_name(number) for number in range(layout.shards)], {})

    def sums(self, directory: Storage, shards: Iterable[int]) -> dict[int, Sums]:
        """The tables of checksums of these shard files, by number; each is read once, several at a time.

        Raises:
            CheckpointDamaged: if one is missing or damaged.
        """
        numbers = sorted(set(shards))
        with self._lock:  # of several threads that want the same ones, one reads them
            missing = [number for number in numbers if number not in self._sums]
            reads = ((_TABLE_BYTES, partial(self._read_sums, directory, number)) for number in missing)
            self._sums.update(zip(missing, read_ahead(reads), strict=True))
            return {number: self._sums[number] for number in numbers}

    def _read_sums(self, directory: Storage, number: int) -> Sums:
        name = self.files[number]
        table, size = sums_name(name), self.manifest.files[name].size
        return Sums.decode(read_checked(directory, table, self.manifest), table, size, int(self.layout.counts[number]))


def _check_room(layout: Layout, manifest: Manifest, name: str) -> None:
    """Raise CheckpointDamaged for types that there are not, and for more bytes of tensors than all files have.

    Or a few bytes would make whoever reads a whole tensor ask for terabytes.
    """
    tensors = layout.tensors.values()
    size = sum(prod(tensor.shape) * torch_dtype(tensor.dtype).itemsize for tensor in tensors)
    if size > manifest.total_bytes:
        raise CheckpointDamaged(f"{name}: tensors of {size} bytes, in files of {manifest.total_bytes}")
