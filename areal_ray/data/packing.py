"""Documents laid end to end and cut into sequences of equal length."""

from __future__ import annotations

import zlib

import numpy as np
import xxhash

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data.sources import documents
from areal_ray.data.tokenizers import Tokenizer


class PackedTokens:
    """Sequences of `seq_len` tokens, addressed by number.

    Args:
        tokens: 1-D array of token ids; what does not fill a last sequence is left out.
        seq_len: tokens per sequence.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        count = len(tokens) // seq_len
        self._sequences = tokens[: count * seq_len].reshape(count, seq_len)

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """The sequences of the given numbers: (len(indices), seq_len), int64."""
        return self._sequences[indices].astype(np.int64)

    def fingerprint(self) -> str:
        """A hash of shape and content: the same data, tokenizer and length, or not."""
        digest = xxhash.xxh3_128(str((self._sequences.shape, self._sequences.dtype.str)).encode())
        digest.update(np.ascontiguousarray(self._sequences).data)
        return digest.hexdigest()


def load_splits(
    config: DataConfig, tokenizer: Tokenizer, seq_len: int, global_batch_size: int
) -> tuple[PackedTokens, PackedTokens]:
    """Read everything once: (train, held-out), split by document.

    A document's side follows from its content alone: it never changes sides when others come or go, and copies of it
    are on the same side.

    Raises:
        ConfigError: if there are too few documents or tokens for one global batch of each.
    """
    train: list[bytes] = []
    held_out: list[bytes] = []
    for _, content in documents(config):
        (held_out if zlib.crc32(content) / 2**32 < config.held_out else train).append(content)
    if not held_out and len(train) > 1:  # few documents: keep one back all the same
        held_out.append(train.pop(min(range(len(train)), key=lambda i: zlib.crc32(train[i]))))
    splits = []
    for side, chosen in (("train on", train), ("hold out", held_out)):
        tokens = np.concatenate([tokenizer.encode(content) for content in chosen] or [np.zeros(0, np.uint32)])
        split = PackedTokens(tokens, seq_len)
        if len(split) < global_batch_size:
            key = "data.paths" if config.source == "text" else "data.source"
            raise ConfigError(
                key,
                f"{len(chosen)} documents to {side} give {len(split)} sequences of train.seq_len={seq_len} tokens, "
                f"but a global batch takes {global_batch_size}: give more text or smaller sizes",
            )
        splits.append(split)
    return splits[0], splits[1]
