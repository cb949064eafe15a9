"""Tensors in what `torch.save` writes, found without running its pickle: where their data lie, in a range of a file.

Such an item is a zip archive that is not compressed, with the data of each storage as one entry, and a pickle that puts
tensors together from them (torch/serialization.py, torch/_utils.py). Of the pickle only the calls that torch makes for
one tensor are followed, and none of them is made: they are written down.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from areal_ray.checkpoint.format.pickle_limits import check_pickle

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}
_AT_ONCE = 4 << 10  # bytes at both ends of an item that are read: the archive's directory, and the pickle
_MOST = 4 << 20  # bytes of the directory, or of the pickle, of one tensor; they have some hundreds


class NoTensor(ValueError):
    """An item is not one tensor as torch saves it."""


@dataclass(frozen=True)
class TorchItem:
    """One tensor in an item.

    Args:
        data: where in the item its first element lies, in bytes.
        dtype, shape: of it.
        stride: in elements.
    """

    data: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie one after the other."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True

    @property
    def extent(self) -> int:
        """Bytes from its first element to the end of its last one."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize if prod(self.shape) else 0


def find_tensor(read: Callable[[int, int], bytes], length: int) -> TorchItem:
    """The tensor in an item; reads some KB of it, twice at most.

    Args:
        read: so many bytes from an offset in the item on.
        length: bytes of the item.

    Raises:
        NoTensor: if it is something else, is compressed, or asks for code.
    """
    file = _Range(read, length)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if "data.pkl" not in entries or entries["data.pkl"].file_size > _MOST:
                raise NoTensor("it has no data.pkl")
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise NoTensor("its bytes are in another order")
            found = _follow(archive.read(entries["data.pkl"]))
            entry = entries.get(f"data/{found.key}")
            if entry is None or entry.compress_type != zipfile.ZIP_STORED:
                raise NoTensor("the data are not there as they are")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OverflowError) as error:
        raise NoTensor(f"it is not what torch.save writes ({error})") from None
    head = file.at(entry.header_offset, 30)  # of a zip's local header: its last two numbers are lengths
    start = entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    item = TorchItem(start + found.offset * found.dtype.itemsize, found.dtype, found.shape, found.stride)
    if found.offset * found.dtype.itemsize + item.extent > entry.file_size or start + entry.file_size > length:
        raise NoTensor("it is larger than its data")
    return item


class _Range(io.RawIOBase):
    """A part of a file as a file, of which both ends are read in one piece."""

    def __init__(self, read: Callable[[int, int], bytes], length: int) -> None:
        self._read_at, self._length, self._place = read, length, 0
        self._from = max(0, length - _AT_ONCE)
        self._end = read(self._from, length - self._from)
        self._begin = b""

    def at(self, offset: int, size: int) -> bytes:
        if not 0 <= offset <= offset + size <= self._length:
            raise NoTensor("it says that it is longer than it is")
        if offset >= self._from:
            return self._end[offset - self._from : offset - self._from + size]
        if offset + size <= min(_AT_ONCE, self._from):
            self._begin = self._begin or self._read_at(0, min(_AT_ONCE, self._from))
            return self._begin[offset : offset + size]
        return self._read_at(offset, size)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._place = max(0, offset + (0, self._place, self._length)[whence])
        return self._place

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self._length - self._place)
        size = left if size is None or size < 0 else min(size, left)
        if size > _MOST:
            raise NoTensor(f"{size} bytes of it are no tensor's")
        data = self.at(self._place, size)
        self._place += len(data)
        return data


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype | None  # None: bytes


@dataclass(frozen=True)
class _Tensor:
    key: str
    dtype: torch.dtype
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _follow(data: bytes) -> _Tensor:
    try:
        check_pickle(data)
        found = _Unpickler(io.BytesIO(data)).load()
    except NoTensor:
        raise
    except Exception as error:  # noqa: BLE001  (a torn pickle raises almost anything)
        raise NoTensor(f"its pickle cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(found, _Tensor):
        raise NoTensor("it is no tensor")
    return found


class _Unpickler(pickle.Unpickler):
    """Makes nothing but what is written down here."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in _CALLS:
            return _CALLS[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("torch", "UntypedStorage"), ("torch.storage", "UntypedStorage")):
            return _Kind(None)
        if module == "torch" and name in _STORAGES:
            return _Kind(_STORAGES[name])
        if module == "torch" and isinstance(torch.__dict__.get(name), torch.dtype):
            return torch.__dict__[name]
        raise NoTensor(f"refused, it wants to load {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, *_ = pid
        if kind != "storage" or not isinstance(storage, _Kind) or type(key) is not str:
            raise NoTensor("it refers to something else than a storage")
        return _Storage(key, storage.dtype)


@dataclass(frozen=True)
class _Kind:
    dtype: torch.dtype | None


def _tensor(
    storage: Any, offset: Any, size: Sequence[Any], stride: Sequence[Any], dtype: torch.dtype | None = None
) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise NoTensor("a tensor of no storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(each) is int and 0 <= each < 2**62 for each in numbers):
        raise NoTensor(f"a tensor of shape {size} and strides {stride}")
    dtype = dtype or storage.dtype
    if not isinstance(dtype, torch.dtype):
        raise NoTensor("a tensor of no type")
    return _Tensor(storage.key, dtype, offset, tuple(size), tuple(stride))


def _v2(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    return _tensor(storage, offset, size, stride)


def _v3(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any) -> _Tensor:
    return _tensor(storage, offset, size, stride, dtype)


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_CALLS = {"_rebuild_tensor_v2": _v2, "_rebuild_tensor_v3": _v3, "_rebuild_parameter": _parameter}
