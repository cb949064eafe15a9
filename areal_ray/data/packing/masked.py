"""Rows of documents laid end to end that do not see each other."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from areal_ray.data.corpus.manifest import digest
from areal_ray.data.dataset import IGNORED
from areal_ray.data.packing.concatenate import ConcatenatedRows


class MaskedRows(ConcatenatedRows):
    """ConcatenatedRows with position_ids, which begin anew with each document and with each row.

    A rank holds where documents begin, 8 bytes each, from the first row on.

    Args:
        stream, seq_len: as for ConcatenatedRows.
    """

    @cached_property
    def _starts(self) -> np.ndarray:
        lengths = self._stream.document_lengths()
        return np.cumsum(lengths, dtype=np.int64) - lengths

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = super().__getitem__(indices)
        width = rows["input_ids"].shape[1]
        begins = np.asarray(indices, np.int64)[:, None] * width
        at = begins + np.arange(width)
        starts = self._starts[np.searchsorted(self._starts, at, "right") - 1]
        rows["position_ids"] = at - np.maximum(starts, begins)
        # What begins a document is predicted from nothing.
        rows["labels"][:, :-1][rows["position_ids"][:, 1:] == 0] = IGNORED
        return rows

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the stream's and of the length; reads nothing."""
        return digest(["concatenate", "document_mask", self._stream.fingerprint, self._seq_len])

    def old_fingerprint(self) -> None:
        """None: there were no such rows before corpora were prepared."""
