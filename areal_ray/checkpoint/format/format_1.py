"""Reader of checkpoints of format 1, which have their layout in DCP's `.metadata` and all checksums in the manifest.

`.metadata` is a pickle, which could run anything: names are checked against an allow-list.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from areal_ray.checkpoint.format.layout import Cut, Layout, StoredTensor
from areal_ray.checkpoint.format.manifest import MANIFEST, METADATA, CheckpointDamaged, Manifest
from areal_ray.checkpoint.format.pickle_limits import TooMuch, check_pickle
from areal_ray.checkpoint.format.sums import Sums

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorProperties",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}


_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")  # of the checkpoint when it was saved


def _path(*parts: object) -> str:
    return "/".join(map(str, parts))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module.partition(".")[0] == "pathlib" and name in _PATHS:
            return _path
        if module == "torch" and isinstance(torch.__dict__.get(name), torch.dtype):
            return torch.__dict__[name]
        raise CheckpointDamaged(f"{METADATA}: refused, it wants to load {module}.{name}")


def decode_metadata(data: bytes) -> Metadata:
    """DCP metadata from its bytes.

    Raises:
        CheckpointDamaged: if it is not metadata of tensors alone, or asks for code that has no place in it.
    """
    metadata = unpickle_metadata(data)
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str):
            raise CheckpointDamaged(f"{METADATA}: {name!r} is no name of a tensor")
        if isinstance(entry, BytesStorageMetadata):
            raise CheckpointDamaged(f"{METADATA}: {name!r} is a pickled object; only tensors are loaded")
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointDamaged(f"{METADATA}: {name!r} is of an unknown kind")
    return metadata


def unpickle_metadata(data: bytes) -> Metadata:
    """DCP metadata from its bytes, whatever they describe: nothing but its own classes is made.

    Raises:
        CheckpointDamaged: if it is none, or asks for code that has no place in it.
    """
    try:
        check_pickle(data)
        metadata = _Unpickler(io.BytesIO(data)).load()
    except CheckpointDamaged:
        raise
    except TooMuch as error:
        raise CheckpointDamaged(f"{METADATA}: refused, {error}") from None
    except Exception as error:  # noqa: BLE001  (a torn pickle raises almost anything)
        raise CheckpointDamaged(f"{METADATA}: not readable ({type(error).__name__}: {error})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointDamaged(f"{METADATA}: holds no DCP metadata")
    return metadata


def old_layout(manifest: Manifest, data: bytes) -> tuple[Layout, dict[str, Sums]]:
    """The layout and the tables of checksums of a checkpoint of format 1.

    Args:
        manifest: with the checksums of all parts.
        data: bytes of `.metadata`.

    Returns:
        The layout, and the table of each shard file, by its name, in the order of the layout's numbers.

    Raises:
        CheckpointDamaged: if they do not fit each other, or parts are not exactly the tensors.
    """
    metadata = decode_metadata(data)
    names = sorted(name for name, record in manifest.files.items() if record.chunks)
    numbers = {name: number for number, name in enumerate(names)}
    rows: dict[str, list[tuple[int, int, str]]] = {name: [] for name in names}
    tensors = {}
    try:
        sums = {
            name: {offset: (length, digest) for offset, length, digest in _chunks(manifest, name)} for name in names
        }
        for tensor, entry in metadata.state_dict_metadata.items():
            boxes, shards = [], []
            for chunk in entry.chunks:  # type: ignore[union-attr]
                place = metadata.storage_data[MetadataIndex(tensor, chunk.offsets)]
                if place.relative_path not in manifest.files:
                    raise CheckpointDamaged(f"{place.relative_path}: not in the manifest")
                if place.offset not in sums.get(place.relative_path, {}):
                    raise CheckpointDamaged(f"{place.relative_path}: no checksum for the bytes at {place.offset}")
                if not all(chunk.sizes):
                    continue
                boxes.append([list(chunk.offsets), list(chunk.sizes)])
                shards.append(numbers[place.relative_path])
                rows[place.relative_path].append((place.offset, *sums[place.relative_path][place.offset]))
            cut = Cut(np.array(boxes, np.int64).reshape(len(boxes), 2, len(entry.size)), np.array(shards, np.int64))  # type: ignore[union-attr]
            dtype = str(entry.properties.dtype).removeprefix("torch.")  # type: ignore[union-attr]
            tensors[tensor] = StoredTensor(tuple(entry.size), dtype, cut)  # type: ignore[union-attr]
        layout = Layout(tensors, len(names))
        return layout, {name: Sums.of_format_1(rows[name]) for name in names}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointDamaged(f"{METADATA}: not readable ({type(error).__name__}: {error})") from None


def _chunks(manifest: Manifest, name: str) -> list[tuple[int, int, str]]:
    """Offset, length and checksum of each part of a file, which has them (CheckpointDamaged, ValueError, TypeError)."""
    record = manifest.files[name]
    for offset, length, _ in record.chunks:
        if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= record.size:
            raise CheckpointDamaged(f"{MANIFEST}: {name} has no {length} bytes at {offset}")
    return [(offset, length, digest) for offset, length, digest in record.chunks]
