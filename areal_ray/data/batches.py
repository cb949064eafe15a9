"""Global batches addressed by one integer."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from areal_ray.data.dataset import TokenDataset, is_same
from areal_ray.data.prefetch import Batch, Rows, batch_maker


class GlobalBatches:
    """This rank's part of an endless sequence of global batches.

    The cursor is the number of samples that have been given out, over all ranks. Sample `n` is a pure function of
    (seed, n): position n % N of the shuffle of epoch n // N, or what the data set's own order says. So the cursor is
    the whole state, any world size that divides the batch continues any other's, and no sample is lost or repeated.

    Args:
        sequences: the data, N sequences.
        seed: of the shuffle, which differs from epoch to epoch.
        global_batch_size: sequences per batch over all ranks.
        rank, world_size: which part is this rank's: rows rank, rank + world_size, ... of the global batch.
        device: where batches are put. To a GPU they are brought one ahead of need.
        may_differ: "data" or "run.seed", if a checkpoint's cursor may be taken over into other data or another order.
        record: told of every global batch: the cursor at which it begins and the numbers of its sequences.
        ahead: batches whose rows are read before they are needed, in a thread; the cursor knows nothing of it.
    """

    def __init__(
        self,
        sequences: TokenDataset,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device | str = "cpu",
        may_differ: Collection[str] = (),
        record: Callable[[int, list[int]], None] | None = None,
        ahead: int = 0,
    ) -> None:
        if global_batch_size % world_size:
            raise ValueError(f"a global batch of {global_batch_size} cannot be shared evenly by {world_size} ranks")
        # Brings grain, which other users of this package's data need not have.
        from areal_ray.data.shuffle import order_of

        self._sequences, self._order = sequences, order_of(sequences, seed)
        self._batch_size, self._rank, self._world_size = global_batch_size, rank, world_size
        self._fingerprint, self._seed, self._may_differ = sequences.fingerprint, seed, may_differ
        self._record = record
        self._maker = batch_maker(self._rows, global_batch_size, torch.device(device), ahead)
        self.next_sample = 0
        self.seconds = 0.0  # that training has waited for batches
        # Of this rank's rows that were given out since this object was made: all positions, and those that are tokens.
        self.positions = self.tokens = 0
        self._counted: dict[int, tuple[int, int]] = {}  # both, by the cursor of batches that are made ahead

    @property
    def epoch(self) -> int:
        """Passes over the data that are complete."""
        return self.next_sample // len(self._sequences)

    def metrics(self) -> dict[str, float]:
        """What the data set has to say of the samples that have been given out."""
        own = getattr(self._sequences, "metrics", None)
        return {} if own is None else dict(own(self.next_sample))

    def ids(self, first: int) -> list[int]:
        """The sequence numbers of the global batch that begins at cursor `first`, in order, over all ranks."""
        return [int(self._order[n]) for n in range(first, first + self._batch_size)]

    def __next__(self) -> Batch:
        """This rank's rows as tensors: what the data set gives, each (global_batch_size / world_size, seq_len).

        An attention mask of nothing but ones is left out.
        """
        began = time.perf_counter()
        first = self.next_sample
        if self._record is not None:
            self._record(first, self.ids(first))
        self.next_sample = first + self._batch_size
        batch = self._maker.take(first)
        positions, tokens = self._counted[first]
        self.positions, self.tokens = self.positions + positions, self.tokens + tokens
        for gone in [cursor for cursor in list(self._counted) if cursor <= first]:
            del self._counted[gone]
        self.seconds += time.perf_counter() - began
        return batch

    def _rows(self, first: int) -> Rows:
        """This rank's rows of the global batch that begins at cursor `first`. Called in a thread where there is one."""
        mine = range(first + self._rank, first + self._batch_size, self._world_size)
        rows = dict(self._sequences[np.asarray([int(self._order[n]) for n in mine])])
        self._counted[first] = _count(rows)
        # Here, where it costs nothing. Of a mask the model asks on the device whether it masks anything, and waits.
        if "attention_mask" in rows and rows["attention_mask"].all():
            del rows["attention_mask"]
        return rows

    def skip(self) -> None:
        """Go past the next batch without making it."""
        if self._record is not None:
            self._record(self.next_sample, self.ids(self.next_sample))
        self.next_sample += self._batch_size

    def close(self) -> None:
        """Let go of what is made ahead; there will be no next batch."""
        self._maker.close()

    def __iter__(self) -> GlobalBatches:
        return self

    def state_dict(self) -> dict[str, Any]:
        place = {"next_sample": self.next_sample, "epoch": self.epoch}
        own = {"sources": metrics} if (metrics := self.metrics()) else {}  # for who reads it
        return {**place, "seed": self._seed, "fingerprint": self._fingerprint, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the cursor.

        Raises:
            ValueError: if it is a cursor into other data, or into another order of them.
        """
        if state["seed"] != self._seed and "run.seed" not in self._may_differ:
            raise ValueError(
                f"run.seed is {self._seed}, but the checkpoint's data are in the order of seed {state['seed']}: some "
                "samples would be repeated, others left out. Restore it, or start a new run under another run.name"
            )
        if "data" not in self._may_differ and not is_same(self._sequences, state["fingerprint"]):
            raise ValueError(
                f"the data is not what the checkpoint was trained on (fingerprint {self._fingerprint}, then "
                f"{state['fingerprint']}): files, tokenizer or train.seq_len have changed. Restore them, or start a "
                "new run under another run.name"
            )
        self.next_sample = state["next_sample"]


def _count(rows: Rows) -> tuple[int, int]:
    """Positions of rows, those of pairs in both, and how many of them are no padding."""
    positions = tokens = 0
    for name, ids in rows.items():
        if name.endswith("input_ids"):
            mask = rows.get(f"{name.removesuffix('input_ids')}attention_mask")
            positions += ids.size
            tokens += ids.size if mask is None else int(np.count_nonzero(mask))
    return positions, tokens
