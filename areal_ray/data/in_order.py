"""Rows in their order, each once: what is evaluated apart from training."""

from __future__ import annotations

import numpy as np
import torch

from areal_ray.data.dataset import IGNORED, TokenDataset


class InOrder:
    """This rank's parts of global batches of all rows, none twice.

    The last batch is filled with rows in which nothing is predicted, so that all ranks have as many.

    Args:
        rows: the data.
        per_rank: rows of one rank in a batch.
        rank, world_size: which part is this rank's.
        most: rows at most; None: all.
    """

    def __init__(self, rows: TokenDataset, per_rank: int, rank: int, world_size: int, most: int | None = None) -> None:
        self._rows, self._per_rank, self._rank, self._world_size = rows, per_rank, rank, world_size
        self.count = len(rows) if most is None else min(most, len(rows))
        self._first = 0

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return -(-self.count // (self._per_rank * self._world_size))

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._first >= self.count:
            raise StopIteration
        mine = np.arange(self._first + self._rank, self._first + self._per_rank * self._world_size, self._world_size)
        self._first += self._per_rank * self._world_size
        there = mine < self.count
        found = dict(self._rows[np.where(there, mine, 0)])
        for name, values in found.items():
            if name.endswith("labels") and not there.all():
                found[name] = np.where(there[:, None], values, IGNORED)
        if "attention_mask" in found and found["attention_mask"].all():  # as in training
            del found["attention_mask"]
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in found.items()}

    def __iter__(self) -> InOrder:
        return self

    def close(self) -> None: ...
