"""An endless shuffle that is computed per index, by grain.

A module of its own, imported where it is used: what else the package does with data needs no grain.
"""

from __future__ import annotations

import absl.logging

from areal_ray.data.dataset import Order, TokenDataset

absl.logging.set_verbosity(absl.logging.ERROR)  # grain warns at import that JAX is not there
import grain.python as grain  # noqa: E402


def order_of(sequences: TokenDataset, seed: int) -> Order:
    """The row of each sample: as the data set says (`order`), or a shuffle of all rows in every epoch."""
    own = getattr(sequences, "order", None)
    return shuffled(len(sequences), seed) if own is None else own(seed)


def shuffled(count: int, seed: int) -> Order:
    """Random access to epoch after epoch of the numbers below `count`, each in another order, in O(1) memory."""
    order: Order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    return order
