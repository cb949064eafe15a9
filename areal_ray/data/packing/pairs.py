"""Preference pairs: a row has a chosen and a rejected answer to one prompt."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from areal_ray.data.corpus.corpus import TokenStream
from areal_ray.data.corpus.manifest import digest
from areal_ray.data.packing.whole import Pieces, Truncation, one_a_row, pieces_of, rows_of

REJECTED = "rejected_"  # before the names of the second answer's arrays


class PairRows:
    """Rows of a pair each: input_ids, labels and attention_mask of the chosen, and rejected_... of the other.

    A TokenDataset; an objective of one's own reads it. Memory: 16 bytes a sequence in every rank.

    Args:
        stream: documents of two sequences each.
        seq_len: tokens of an answer with its prompt.
        truncation: of longer ones; dropped are both.
    """

    def __init__(self, stream: TokenStream, seq_len: int, truncation: Truncation) -> None:
        assert truncation != "split"
        self._stream, self._seq_len, self._truncation = stream, seq_len, truncation

    @cached_property
    def _pieces(self) -> Pieces:
        lengths = self._stream.sequence_lengths()
        assert len(lengths) % 2 == 0
        if self._truncation != "drop":
            return pieces_of(lengths, self._seq_len, self._truncation)
        chosen, rejected = (lengths <= self._seq_len).reshape(-1, 2).T
        fits = chosen & rejected
        begins, keep = np.cumsum(lengths, dtype=np.int64) - lengths, np.repeat(fits, 2)
        left_out = int((~fits).sum())
        said = f"{left_out:,} of {len(fits):,} pairs are longer than train.seq_len={self._seq_len} tokens"
        return Pieces(begins[keep], lengths[keep], f"data: {said}: left out" if left_out else "")

    @property
    def note(self) -> str:
        """What has become of what is longer than a row; "" if nothing is."""
        return self._pieces.note

    def __len__(self) -> int:
        return len(self._pieces.begins) // 2

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of the given numbers, as wide as the longest of them needs, in steps of 64 tokens."""
        numbers = np.asarray(indices, np.int64) * 2
        both = rows_of(self._stream, one_a_row(self._pieces), np.concatenate([numbers, numbers + 1]), self._seq_len)
        count = len(numbers)
        chosen = {name: values[:count] for name, values in both.items()}
        return chosen | {REJECTED + name: values[count:] for name, values in both.items()}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the stream's and of how rows are made of it; reads nothing."""
        return digest(["pairs", self._truncation, self._stream.fingerprint, self._seq_len])
