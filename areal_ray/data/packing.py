"""Documents laid end to end and cut into sequences of equal length."""

from __future__ import annotations

import zlib
from functools import cached_property

import numpy as np
import xxhash

from areal_ray.config import ConfigError, DataConfig, plugin
from areal_ray.data.dataset import TokenDataset, next_tokens
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

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """input_ids and labels of the sequences of the given numbers; there is no padding to mask."""
        input_ids = self._sequences[indices].astype(np.int64)
        return {"input_ids": input_ids, "labels": next_tokens(input_ids)}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of shape and content: the same data, tokenizer and length, or not."""
        digest = xxhash.xxh3_128(str((self._sequences.shape, self._sequences.dtype.str)).encode())
        digest.update(np.ascontiguousarray(self._sequences).data)
        return digest.hexdigest()


def load_splits(
    config: DataConfig, tokenizer: Tokenizer, seq_len: int, global_batch_size: int
) -> tuple[TokenDataset, TokenDataset]:
    """The data to train on and the held-out data.

    A source of one's own is called as `source(tokenizer, seq_len, **data.args)` and returns both.

    Raises:
        ConfigError: if there is too little for one global batch of each, or one's own source fails.
    """
    if plugin.is_plugin(config.source):
        source = plugin.factory(config.source, "data.source", {})
        made = plugin.call(source, config.source, "data.args", tokenizer, seq_len, **config.args)
        if not (isinstance(made, tuple) and len(made) == 2):
            raise ConfigError("data.source", f"{config.source} must return two data sets: (train, held out)")
        for split in made:
            if lacks := [name for name in ("__len__", "__getitem__", "fingerprint") if not hasattr(split, name)]:
                raise ConfigError("data.source", f"{config.source}: a {type(split).__name__} has no {lacks[0]}")
        train, held_out = made
        counts = {"train on": f"{len(train)} rows", "hold out": f"{len(held_out)} rows"}
    else:
        train, held_out, counts = _split_documents(config, tokenizer, seq_len)
    for side, split in (("train on", train), ("hold out", held_out)):
        if len(split) < global_batch_size:
            raise ConfigError(
                "data.paths" if config.source == "text" else "data.source",
                f"{counts[side]} to {side} give {len(split)} sequences of train.seq_len={seq_len} tokens, "
                f"but a global batch takes {global_batch_size}: give more text or smaller sizes",
            )
    return train, held_out


def _split_documents(
    config: DataConfig, tokenizer: Tokenizer, seq_len: int
) -> tuple[PackedTokens, PackedTokens, dict[str, str]]:
    """Read everything once: train, held out, and how many documents each has.

    A document's side follows from its content alone: it never changes sides when others come or go, and copies of it
    are on the same side.
    """
    train: list[bytes] = []
    held_out: list[bytes] = []
    for _, content in documents(config):
        (held_out if zlib.crc32(content) / 2**32 < config.held_out else train).append(content)
    if not held_out and len(train) > 1:  # few documents: keep one back all the same
        held_out.append(train.pop(min(range(len(train)), key=lambda i: zlib.crc32(train[i]))))

    def packed(chosen: list[bytes]) -> PackedTokens:
        tokens = np.concatenate([tokenizer.encode(content) for content in chosen] or [np.zeros(0, np.uint32)])
        return PackedTokens(tokens, seq_len)

    counts = {"train on": f"{len(train)} documents", "hold out": f"{len(held_out)} documents"}
    return packed(train), packed(held_out), counts
