"""Encoder of DCP's `.metadata` that needs no torch: the pickle is put together from its parts.

`.metadata` is a pickle of torch.distributed.checkpoint.metadata.Metadata with three objects for each part of each
tensor. At 1,024 ranks of a 70B model these are 6.6 million, which take pickle minutes and gigabytes. Here each part is
some 80 bytes that are written at once, about 2 microseconds, and what is equal is written once and named again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
# Opcodes of pickle's protocol 4, see pickletools.
_START, _STOP, _MARK, _NONE, _FALSE = b"\x80\x04", b".", b"(", b"N", b"\x89"
_POP, _MEMOIZE, _GET, _GLOBAL, _REDUCE, _NEW, _BUILD = b"0", b"\x94", b"j", b"\x93", b"R", b")\x81", b"b"
_DICT, _LIST, _TUPLE, _TUPLE1, _ITEMS, _APPENDS = b"}", b"]", b"t", b"\x85", b"u", b"e"


@dataclass(frozen=True)
class MetadataParts:
    """What `.metadata` says, in numbers.

    Args:
        tensors: name, name of the type in torch, shape and number of the cut of each.
        cuts: for each way in which tensors are cut, the boxes ((parts, 2, dimensions): offset and length) and the
            number of the file (parts,) of each part, as arrays.
        files: names of the files by their numbers.
        offsets, sizes: bytes of each part in its file, tensor after tensor, as arrays.
        paths: keys on the way to a tensor in the nested state, by its name; from them torch's tools nest it again.
    """

    tensors: Sequence[tuple[str, str, tuple[int, ...], int]]
    cuts: Sequence[tuple[Any, Any]]
    files: Sequence[str]
    offsets: Any
    sizes: Any
    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class _Pickle:
    """Bytes of a pickle in the making, with its memo."""

    def __init__(self) -> None:
        self.out: list[bytes] = [_START]
        self._known: dict[Any, bytes] = {}
        self._memo = 0

    def define(self, what: bytes) -> bytes:
        """Write an object ahead of its use; what names it from then on."""
        self.out.append(what + _MEMOIZE + _POP)
        self._memo += 1
        return _GET + struct.pack("<I", self._memo - 1)

    def once(self, key: Any, what: bytes) -> bytes:
        if key not in self._known:
            self._known[key] = self.define(what)
        return self._known[key]

    def text(self, value: str) -> bytes:
        data = value.encode("utf-8", "surrogatepass")
        return self.once(("text", value), b"X" + struct.pack("<I", len(data)) + data)

    def name(self, module: str, name: str) -> bytes:
        """A class, function or constant of a module."""
        return self.once((module, name), self.text(module) + self.text(name) + _GLOBAL)

    def size(self, numbers: tuple[int, ...]) -> bytes:
        """A torch.Size."""
        whole = _MARK + b"".join(map(_int, numbers)) + _TUPLE
        return self.once(("size", numbers), self.name("torch", "Size") + whole + _TUPLE1 + _REDUCE)

    def instance(self, module: str, name: str, **fields: bytes) -> bytes:
        """An object with these attributes."""
        return self.name(module, name) + _NEW + self.fields(fields) + _BUILD

    def fields(self, fields: dict[str, bytes]) -> bytes:
        return _DICT + _MARK + b"".join(self.text(key) + value for key, value in fields.items()) + _ITEMS


def _int(value: int) -> bytes:
    if 0 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def encode(parts: MetadataParts) -> bytes:
    """`.metadata`: that of DCP's own planner, but for the numbers of parts, which are in the order of the cut here."""
    pickle = _Pickle()
    boxes = [[_sizes(pickle, box) for box in cut.tolist()] for cut, _ in parts.cuts]
    chunks = [
        [
            pickle.define(pickle.instance(_METADATA, "ChunkStorageMetadata", offsets=offset, sizes=length))
            for offset, length in cut
        ]
        for cut in boxes
    ]
    files = [pickle.text(name) for name in parts.files]
    tensors = _tensors(pickle, parts, chunks)
    stored = list(_stored(pickle, parts, boxes, files))
    planner_data = _paths(pickle, parts.paths)
    pickle.out.append(pickle.name(_METADATA, "Metadata") + _NEW + _DICT + _MARK)
    pickle.out += [pickle.text("state_dict_metadata"), _DICT, *tensors, pickle.text("storage_data"), _DICT, *stored]
    empty = {"checkpoint_id": _NONE, "save_id": _NONE, "load_id": _NONE, "modules": _LIST}
    rest = {
        "planner_data": planner_data,
        "storage_meta": pickle.instance(_METADATA, "StorageMeta", **empty),
        "version": _NONE,
    }
    pickle.out += [pickle.text(key) + value for key, value in rest.items()]
    pickle.out += [_ITEMS, _BUILD, _STOP]
    return b"".join(pickle.out)


def _paths(pickle: _Pickle, paths: Mapping[str, tuple[str, ...]]) -> bytes:
    """What DCP's planner keeps: the path of each tensor by its name, as flatten_state_dict gives it."""
    if not paths:
        return _NONE
    items = []
    for name, path in paths.items():
        items += [pickle.text(name), _MARK, *map(pickle.text, path), _TUPLE]
    # Ahead of its use, as texts are: what they define must not lie between the items of the dictionary.
    return pickle.define(b"".join([_DICT, _MARK, *items, _ITEMS]))


def _sizes(pickle: _Pickle, box: Sequence[Sequence[int]]) -> tuple[bytes, bytes]:
    return pickle.size(tuple(box[0])), pickle.size(tuple(box[1]))


def _tensors(pickle: _Pickle, parts: MetadataParts, chunks: Sequence[Sequence[bytes]]) -> list[bytes]:
    written = []
    for name, dtype, shape, cut in parts.tensors:
        entry = pickle.instance(
            _METADATA,
            "TensorStorageMetadata",
            properties=_properties(pickle, dtype),
            size=pickle.size(shape),
            chunks=_LIST + _MARK + b"".join(chunks[cut]) + _APPENDS,
        )
        written.append(_MARK + pickle.text(name) + entry + _ITEMS)
    return written


def _properties(pickle: _Pickle, dtype: str) -> bytes:
    """TensorProperties, whose state is a tuple: type, layout, requires_grad, memory format, pin_memory."""
    layout = pickle.name("torch.serialization", "_get_layout") + pickle.text("torch.strided") + _TUPLE1 + _REDUCE
    contiguous = pickle.name(_METADATA, "_MEM_FORMAT_ENCODING") + _int(0) + _TUPLE1 + _REDUCE
    state = _MARK + pickle.name("torch", dtype) + layout + _FALSE + contiguous + _FALSE + _TUPLE
    return pickle.once(("properties", dtype), pickle.name(_METADATA, "TensorProperties") + _NEW + state + _BUILD)


def _stored(
    pickle: _Pickle, parts: MetadataParts, boxes: Sequence[Sequence[tuple[bytes, bytes]]], files: Sequence[bytes]
) -> Iterable[bytes]:
    """Items of storage_data: MetadataIndex(name, offset, number of the part) to _StorageInfo(file, offset, length)."""
    key, value = (
        pickle.name(module, name) + _NEW + _DICT + _MARK
        for module, name in ((_METADATA, "MetadataIndex"), (_FILESYSTEM, "_StorageInfo"))
    )
    fqn, offset, index, path, length = map(pickle.text, ("fqn", "offset", "index", "relative_path", "length"))
    end = _ITEMS + _BUILD
    # All but the name of the tensor and the place in the file is the same for all tensors that are cut alike.
    heads = [[offset + at + index + _int(i) + end + value + path for i, (at, _) in enumerate(cut)] for cut in boxes]
    owners = [[files[number] + offset for number in shards.tolist()] for _, shards in parts.cuts]
    start = 0
    for name, _, _, cut in parts.tensors:
        count = len(heads[cut])
        first = key + fqn + pickle.text(name)
        offsets, sizes = parts.offsets[start : start + count].tolist(), parts.sizes[start : start + count].tolist()
        yield _MARK
        for head, owner, at, size in zip(heads[cut], owners[cut], offsets, sizes, strict=True):
            yield first + head + owner + _int(at) + length + _int(size) + end
        yield _ITEMS
        start += count
