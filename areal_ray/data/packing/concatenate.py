"""Documents laid end to end and cut into sequences of equal length."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np
import xxhash

from areal_ray.data.corpus.corpus import TokenStream
from areal_ray.data.corpus.manifest import digest
from areal_ray.data.dataset import IGNORED, next_tokens

_MOST_BEFORE = 1 << 33  # tokens


class PackedTokens:
    """Sequences of `seq_len` tokens of an array in memory, addressed by number.

    Args:
        tokens: 1-D array of token ids; what does not fill a last sequence is left out.
        seq_len: tokens per sequence.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        count = len(tokens) // seq_len
        self._sequences = tokens[: count * seq_len].reshape(count, seq_len)

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """input_ids and labels of the sequences of the given numbers; there is no padding to mask."""
        input_ids = self._sequences[indices].astype(np.int64)
        return {"input_ids": input_ids, "labels": next_tokens(input_ids)}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of shape and content: the same data, tokenizer and length, or not."""
        return _content_hash(self._sequences.shape, self._sequences.dtype.str, [self._sequences])


class ConcatenatedRows:
    """Sequences of `seq_len` tokens of a stream, read when they are asked for. Row i begins at token i * seq_len.

    Args:
        stream: what does not fill a last sequence is left out.
        seq_len: tokens per sequence.
        old_dtype: of tokens in fingerprints that were made before corpora were prepared.
    """

    def __init__(self, stream: TokenStream, seq_len: int, old_dtype: str = "<u2") -> None:
        self._stream, self._seq_len, self._old_dtype = stream, seq_len, old_dtype

    def __len__(self) -> int:
        return len(self._stream) // self._seq_len

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """input_ids and labels of the sequences of the given numbers; there is no padding to mask."""
        begins = np.asarray(indices, np.int64) * self._seq_len
        input_ids = self._stream.read(begins, self._seq_len).astype(np.int64)
        labels = next_tokens(input_ids)
        if self._stream.masked:
            predicted = self._stream.predicted(begins, self._seq_len)
            labels[:, :-1][~predicted[:, 1:]] = IGNORED
        return {"input_ids": input_ids, "labels": labels}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the stream's and of the length; reads nothing."""
        return digest(["concatenate", self._stream.fingerprint, self._seq_len])

    def old_fingerprint(self) -> str | None:
        """The hash over all tokens that stands in checkpoints from before corpora were prepared; reads all of them.

        None if there are none of such data: every process had to hold all tokens in memory, and predicted all of them.
        """
        if self._stream.masked or len(self._stream) > _MOST_BEFORE:
            return None
        pieces = (piece.astype(self._old_dtype) for piece in self._stream.pieces(len(self) * self._seq_len))
        return _content_hash((len(self), self._seq_len), self._old_dtype, pieces)


def _content_hash(shape: tuple[int, ...], dtype: str, pieces: Iterable[np.ndarray]) -> str:
    content = xxhash.xxh3_128(str((shape, dtype)).encode())
    for piece in pieces:
        content.update(np.ascontiguousarray(piece).data)
    return content.hexdigest()
