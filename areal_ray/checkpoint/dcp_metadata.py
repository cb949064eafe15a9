"""Reader of DCP's `.metadata`, a pickle, which could run anything: names are checked against an allow-list."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from areal_ray.checkpoint.manifest import METADATA, CheckpointDamaged

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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(torch.__dict__.get(name), torch.dtype):
            return torch.__dict__[name]
        raise CheckpointDamaged(f"{METADATA}: refused, it wants to load {module}.{name}")


def decode_metadata(data: bytes) -> Metadata:
    """DCP metadata from its bytes.

    Raises:
        CheckpointDamaged: if it is not metadata of tensors alone, or asks for code that has no place in it.
    """
    try:
        metadata = _Unpickler(io.BytesIO(data)).load()
    except CheckpointDamaged:
        raise
    except Exception as error:  # noqa: BLE001  (a torn pickle raises almost anything)
        raise CheckpointDamaged(f"{METADATA}: not readable ({type(error).__name__}: {error})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointDamaged(f"{METADATA}: holds no DCP metadata")
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            raise CheckpointDamaged(f"{METADATA}: {name!r} is a pickled object; only tensors are loaded")
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointDamaged(f"{METADATA}: {name!r} is of an unknown kind")
    return metadata
