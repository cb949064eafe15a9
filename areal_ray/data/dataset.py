"""A data set: rows of tokens, addressed by number."""

from __future__ import annotations

from typing import Protocol

import numpy as np

IGNORED = -100  # in labels: nothing is predicted at this position; cross entropy's own ignore_index


class Order(Protocol):
    """Which row each sample is."""

    def __getitem__(self, n: int) -> int: ...


class TokenDataset(Protocol):
    """Rows of equal length, the same on every machine and at every start.

    A data source of one's own (`data.source: package.module:function`) returns two of them; see `own_splits`. Each is
    read in a thread of its own, so that both may be read at once, and beside a training step: rows must not be drawn
    from the global random generators.
    """

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of the given numbers, int64, each array of shape (len(indices), seq_len).

        `input_ids`; `labels`, shifted already: the token after each position, -100 where nothing is predicted;
        `attention_mask` where rows are padded (one of nothing but ones is left out of the batch); `position_ids` where
        several documents are packed into a row; and whatever else the objective reads.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the rows depend on: a run goes on only with the data that it began with."""
        ...


def is_same(sequences: TokenDataset, fingerprint: str) -> bool:
    """Whether rows are those of a fingerprint, also of one that an earlier version made, for which all are read."""
    if sequences.fingerprint == fingerprint:
        return True
    old = getattr(sequences, "old_fingerprint", None)
    return old is not None and old() == fingerprint


def next_tokens(input_ids: np.ndarray) -> np.ndarray:
    """Labels of rows of text: at each position the next token; nothing at the last."""
    labels = np.full_like(input_ids, IGNORED)
    labels[:, :-1] = input_ids[:, 1:]
    return labels
