"""Token files: a .bin of nothing but token ids and an .idx of where its documents end, as Megatron-LM has them.

NeMo, MaxText and Megatron read and write the same pair (megatron/core/datasets/indexed_dataset.py). A token is at its
number times its size, so that a row is one read of a file or one range of an object, whatever its length is to be; no
other format that `tests/bench/data_formats.py` compares is read without an index of rows in memory.

A *sequence* is what a tokenizer gave in one piece; a *document* is one or more of them: one for text, two for a pair of
answers. Which tokens are predicted stands beside the pair, in a .predicted.bin of a byte a token, if not all are.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from areal_ray.config import ConfigError
from areal_ray.data.records import Tokens
from areal_ray.storage import Sink, Storage

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron's codes; 6 and 7 are floats
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_LONGEST = 1 << 30  # tokens of one sequence: lengths have 32 bits
_BUFFER = 4 << 20  # bytes that are written at a time


def token_dtype(largest_id: int) -> np.dtype[Any]:
    """The smallest type of Megatron's that holds all ids."""
    return np.dtype("<u2" if largest_id < 2**16 else "<i4")


def index(lengths: np.ndarray, dtype: np.dtype[Any], documents: np.ndarray | None = None) -> bytes:
    """The .idx of sequences of these lengths that lie end to end.

    Args:
        lengths: tokens of each sequence.
        dtype: of a token.
        documents: number of the first sequence of each document; None: every sequence is one.
    """
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    first = np.arange(len(lengths)) if documents is None else documents
    bounds = np.append(first, len(lengths)).astype("<i8")
    head = _HEADER.pack(_MAGIC, _VERSION, _CODES[dtype], len(lengths), len(bounds))
    pointers = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    return b"".join([head, lengths.astype("<i4").tobytes(), pointers.astype("<i8").tobytes(), bounds.tobytes()])


@dataclass(frozen=True)
class Index:
    """The head of an .idx, and where its parts are.

    Args:
        dtype: of a token.
        sequences: their number.
        bounds: the number of document bounds, one more than documents.
    """

    dtype: np.dtype[Any]
    sequences: int
    bounds: int

    @staticmethod
    def read(storage: Storage, name: str) -> Index:
        """Raises ValueError if it is no .idx, or of floats."""
        head = storage.read_range(name, 0, _HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise ValueError(f"{storage.location}/{name} is no index of a Megatron token file")
        _, version, code, sequences, bounds = _HEADER.unpack(head)
        if version != _VERSION or code not in _DTYPES:
            raise ValueError(f"{storage.location}/{name}: version {version} with tokens of type {code} is not known")
        return Index(np.dtype(_DTYPES[code]), sequences, bounds)

    def lengths(self, storage: Storage, name: str) -> np.ndarray:
        """Tokens of each sequence, int32: 4 bytes a sequence are read."""
        return np.frombuffer(storage.read_range(name, _HEADER.size, 4 * self.sequences), "<i4")

    def end(self, storage: Storage, name: str) -> int:
        """Tokens up to the end of the last sequence."""
        if not self.sequences:
            return 0
        length = storage.read_range(name, _HEADER.size + 4 * (self.sequences - 1), 4)
        pointer = storage.read_range(name, _HEADER.size + 4 * self.sequences + 8 * (self.sequences - 1), 8)
        return int.from_bytes(pointer, "little") // self.dtype.itemsize + int.from_bytes(length, "little")

    def document_bounds(self, storage: Storage, name: str) -> np.ndarray:
        """Number of the first sequence of each document, and of sequences, int64: 8 bytes a document are read."""
        return np.frombuffer(storage.read_range(name, _HEADER.size + 12 * self.sequences, 8 * self.bounds), "<i8")

    def documents(self, storage: Storage, name: str) -> np.ndarray:
        """Tokens of each document, int64: 12 bytes a sequence are read."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths(storage, name), dtype=np.int64)])
        return np.diff(ends[self.document_bounds(storage, name)])


class TokenWriter:
    """Writes one pair of files, which appear under their names when the block is left without an error.

    Memory: a few megabytes, and 12 bytes a sequence.

    Args:
        storage: where to.
        stem: names are `<stem>.bin`, `<stem>.idx` and, if some tokens are not predicted, `<stem>.predicted.bin`.
        dtype: of a token.
    """

    def __init__(self, storage: Storage, stem: str, dtype: np.dtype[Any]) -> None:
        self._storage, self.stem, self._dtype = storage, stem, dtype
        self._files = ExitStack()
        self._tokens = self._predicted = None  # type: _SummedFile | None
        self._lengths, self._first = array("i"), array("q")
        self.tokens = self.predicted = self.largest_id = 0
        self._index: dict[str, Any] | None = None

    @property
    def documents(self) -> int:
        return len(self._first)

    def begin_document(self) -> None:
        self._first.append(len(self._lengths))

    def add(self, tokens: Tokens) -> None:
        """Add a sequence to the document that was begun.

        Raises:
            ConfigError: for an id that the type of the file does not hold.
        """
        if self._tokens is None:
            self._tokens = self._files.enter_context(_summed(self._storage, f"{self.stem}.bin"))
        count = len(tokens.ids)
        largest = int(tokens.ids.max(initial=0))
        if largest > np.iinfo(self._dtype).max:
            raise ConfigError("data.tokenizer", f"it gave the id {largest}, more than it says that it has")
        if tokens.predicted is not None and self._predicted is None:
            self._predicted = self._files.enter_context(_summed(self._storage, f"{self.stem}.predicted.bin"))
            for begin in range(0, self.tokens, _BUFFER):
                self._predicted.write(b"\x01" * min(_BUFFER, self.tokens - begin))
        if self._predicted is not None:
            mask = np.ones(count, bool) if tokens.predicted is None else tokens.predicted
            assert len(mask) == count
            self._predicted.write(mask.astype(np.uint8).tobytes())
        self._tokens.write(tokens.ids.astype(self._dtype).tobytes())
        self._lengths.extend(min(_LONGEST, count - begin) for begin in range(0, max(1, count), _LONGEST))
        self.tokens += count
        self.predicted += count if tokens.predicted is None else int(tokens.predicted.sum())
        self.largest_id = max(self.largest_id, largest)

    def __enter__(self) -> TokenWriter:
        self._files.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self._tokens is not None:
            data = index(np.asarray(self._lengths), self._dtype, np.asarray(self._first))
            with self._storage.create_whole(f"{self.stem}.idx") as sink:
                sink.write(data)
            self._index = {"bytes": len(data), "digest": xxhash.xxh3_128_hexdigest(data)}
        self._files.__exit__(*error)

    def files(self) -> dict[str, dict[str, Any]]:
        """Size and digest of each file that was written, by name; none if nothing was added."""
        assert (self._tokens is None) == (self._index is None), "the block is not left"
        found: dict[str, dict[str, Any]] = {}
        if self._tokens is not None and self._index is not None:
            found |= {f"{self.stem}.bin": self._tokens.summed(), f"{self.stem}.idx": self._index}
        if self._predicted is not None:
            found[f"{self.stem}.predicted.bin"] = self._predicted.summed()
        return found


class _SummedFile:
    """Sums what it writes, and writes it in large pieces."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._digest, self._bytes = sink, xxhash.xxh3_128(), 0
        self._waiting: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        self._waiting.append(data)
        self._size += len(data)
        if self._size >= _BUFFER:
            self.flush()

    def flush(self) -> None:
        data = b"".join(self._waiting)
        self._digest.update(data)
        self._sink.write(data)
        self._bytes += len(data)
        self._waiting, self._size = [], 0

    def summed(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "digest": self._digest.hexdigest()}


@contextmanager
def _summed(storage: Storage, name: str) -> Iterator[_SummedFile]:
    with storage.create_whole(name) as sink:
        file = _SummedFile(sink)
        yield file
        file.flush()
