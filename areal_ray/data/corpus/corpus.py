"""Reading tokens by position, in a prepared corpus or in other token files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
        name: of the file.
        tokens: how many.
        first: where in the file they begin, counted in tokens.
        mask: file that says which are predicted, a byte a token; None: all of them are.
    """

    name: str
    tokens: int
    first: int = 0
    mask: str | None = None


class TokenStream:
    """The tokens of several files, end to end, by position. Memory: some numbers a file.

    Args:
        storage: with the files.
        files: in order.
        dtype: of a token.
        fingerprint: of all of it.
        lengths: reads how long its documents are.
        sequences: reads how long their sequences are, if that is another question.
    """

    def __init__(
        self,
        storage: Storage,
        files: Sequence[TokenFile],
        dtype: np.dtype[Any],
        fingerprint: str,
        lengths: Callable[[], np.ndarray],
        sequences: Callable[[], np.ndarray] | None = None,
    ) -> None:
        self._files, self.dtype, self.fingerprint, self._lengths = list(files), dtype, fingerprint, lengths
        self._sequences = sequences or lengths
        self._ends = np.cumsum([file.tokens for file in files], dtype=np.int64)
        self.masked = any(file.mask for file in files)
        self._ranges: Ranges = ranges_of(storage, len(self) * (dtype.itemsize + self.masked))

    def __len__(self) -> int:
        """Tokens."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, begins: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each position on, (len(begins), length)."""
        return self._read(begins, length, self.dtype, lambda file: file.name)

    def predicted(self, begins: np.ndarray, length: int) -> np.ndarray:
        """Whether each of these tokens is predicted; only where the stream is `masked`."""
        return self._read(begins, length, np.dtype(bool), lambda file: file.mask)

    def _read(
        self, begins: np.ndarray, length: int, dtype: np.dtype[Any], name_of: Callable[[TokenFile], str | None]
    ) -> np.ndarray:
        spans = [(row, *span) for row, begin in enumerate(begins.tolist()) for span in self._spans(begin, length)]
        found = np.ones((len(begins), length), dtype)  # of a file without a mask all are predicted
        wanted: list[Range] = []
        where: list[tuple[int, int, int]] = []
        for row, at, file, first, count in spans:
            if (name := name_of(file)) is not None:
                size = dtype.itemsize
                wanted.append((name, (file.first + first) * size, count * size))
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
        return self._lengths()

    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence, of which a document has one or more: those of a pair, or pieces of a long text."""
        return self._sequences()


class TokenSource(Protocol):
    """Tokens that are there, to train on and held out."""

    fingerprint: str

    @property
    def location(self) -> str:
        """Where they lie, as a user would type it."""
        ...

    @property
    def old_dtype(self) -> str:
        """Of tokens in fingerprints that were made before corpora were prepared."""
        ...

    def split(self, name: str) -> TokenStream:
        """The tokens of `train` or `held_out`."""
        ...

    def about(self, name: str) -> str:
        """How much a split has, for messages."""
        ...


class Corpus:
    """A prepared corpus as a TokenSource. To open it reads its manifest only.

    Args:
        storage: where it lies.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if this is not one, or one of a later version.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage, self.manifest = storage, Manifest.read(storage)
        self.fingerprint = self.manifest.fingerprint

    @property
    def location(self) -> str:
        return self.storage.location

    @property
    def old_dtype(self) -> str:
        return "<u2" if self.manifest.settings.get("tokenizer") == "bytes" else "<u4"

    def about(self, name: str) -> str:
        return f"{self.manifest.count(name, 'documents')} documents"

    def split(self, name: str) -> TokenStream:
        assert name in SPLITS
        stems = [(shard, shard.stem) for shard in self.manifest.splits[name]]
        files = [
            TokenFile(f"{stem}.bin", shard.tokens, mask=f"{stem}.predicted.bin" if shard.masked else None)
            for shard, stem in stems
        ]
        dtype, fingerprint = np.dtype(self.manifest.dtype), digest([self.fingerprint, name])
        indexes = [f"{stem}.idx" for _, stem in stems]
        return TokenStream(
            *(self.storage, files, dtype, fingerprint, lambda: document_lengths(self.storage, indexes)),
            sequences=lambda: sequence_lengths(self.storage, indexes),
        )


def document_lengths(storage: Storage, indexes: Sequence[str]) -> np.ndarray:
    """Tokens of each document of several .idx files, int64."""
    return np.concatenate(
        [np.zeros(0, np.int64), *(Index.read(storage, name).documents(storage, name) for name in indexes)]
    )


def sequence_lengths(storage: Storage, indexes: Sequence[str]) -> np.ndarray:
    """Tokens of each sequence of several .idx files, int64."""
    return np.concatenate(
        [np.zeros(0, np.int64), *(Index.read(storage, name).lengths(storage, name) for name in indexes)]
    )
