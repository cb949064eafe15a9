"""Reading tokens by position, in a prepared corpus or in other token files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from areal_ray.data.corpus.manifest import SPLITS, Manifest, digest
from areal_ray.data.corpus.ranges import Range, Ranges, ranges_of
from areal_ray.data.corpus.token_file import Index
from areal_ray.storage import Storage

_PIECE = 1 << 22


@dataclass(frozen=True)
class TokenFile:
    """A stretch of tokens in one file.

    Args:
        stem: of its name.
        tokens: how many.
        masked: whether a file beside it says which are predicted.
        first: where in the file they begin.
    """

    stem: str
    tokens: int
    masked: bool = False
    first: int = 0


class TokenStream:
    """The tokens of several files, end to end, by position. Memory: some numbers a file.

    Args:
        storage: with the files.
        files: in order.
        dtype: of a token.
        fingerprint: of all of it.
    """

    def __init__(self, storage: Storage, files: Sequence[TokenFile], dtype: np.dtype[Any], fingerprint: str) -> None:
        self._storage, self._files, self.dtype, self.fingerprint = storage, list(files), dtype, fingerprint
        self._ends = np.cumsum([file.tokens for file in files], dtype=np.int64)
        self._ranges: Ranges = ranges_of(storage)
        self.masked = any(file.masked for file in files)

    def __len__(self) -> int:
        """Tokens."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, begins: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each position on, (len(begins), length)."""
        return self._read(begins, length, ".bin", self.dtype)

    def predicted(self, begins: np.ndarray, length: int) -> np.ndarray:
        """Whether each of these tokens is predicted; only where the stream is `masked`."""
        return self._read(begins, length, ".predicted.bin", np.dtype(bool))

    def _read(self, begins: np.ndarray, length: int, suffix: str, dtype: np.dtype[Any]) -> np.ndarray:
        spans = [(row, *span) for row, begin in enumerate(begins.tolist()) for span in self._spans(begin, length)]
        found = np.ones((len(begins), length), dtype)  # of a file without a mask all are predicted
        wanted: list[Range] = []
        where: list[tuple[int, int, int]] = []
        for row, at, file, first, count in spans:
            if suffix == ".bin" or file.masked:
                size = dtype.itemsize
                wanted.append((file.stem + suffix, (file.first + first) * size, count * size))
                where.append((row, at, count))
        for (row, at, count), data in zip(where, self._ranges.read(wanted), strict=True):
            found[row, at : at + count] = np.frombuffer(data, dtype)
        return found

    def _spans(self, begin: int, length: int) -> Iterator[tuple[int, TokenFile, int, int]]:
        """(position in the row, file, first token in it, tokens) of a row, which may lie in several files."""
        assert begin >= 0
        assert begin + length <= len(self)
        number, done = int(np.searchsorted(self._ends, begin, "right")), 0
        while done < length:
            file = self._files[number]
            first = begin + done - (int(self._ends[number]) - file.tokens)
            count = min(length - done, file.tokens - first)
            if count:
                yield done, file, first, count
            done, number = done + count, number + 1

    def pieces(self, count: int) -> Iterator[np.ndarray]:
        """The first `count` tokens, in pieces."""
        for begin in range(0, count, _PIECE):
            yield self.read(np.asarray([begin]), min(_PIECE, count - begin))[0]

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, int64. Grows with the number of documents: all indexes are read."""
        lengths = [np.zeros(0, np.int64)]
        for file in self._files:
            name = f"{file.stem}.idx"
            lengths.append(Index.read(self._storage, name).documents(self._storage, name))
        return np.concatenate(lengths)


class Corpus:
    """A prepared corpus. To open it reads its manifest only.

    Args:
        storage: where it lies.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if this is not one, or one of a later version.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage, self.manifest = storage, Manifest.read(storage)
        self.fingerprint = self.manifest.fingerprint

    def split(self, name: str) -> TokenStream:
        """The tokens of `train` or `held_out`."""
        assert name in SPLITS
        files = [TokenFile(shard.stem, shard.tokens, shard.masked) for shard in self.manifest.splits[name]]
        return TokenStream(self.storage, files, np.dtype(self.manifest.dtype), digest([self.fingerprint, name]))
