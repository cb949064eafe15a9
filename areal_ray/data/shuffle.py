"""An endless shuffle that is computed per index, by grain.

A module of its own, imported where it is used: what else the package does with data needs no grain.
"""

from __future__ import annotations

from typing import Any

import absl.logging

absl.logging.set_verbosity(absl.logging.ERROR)  # grain warns at import that JAX is not there
import grain.python as grain  # noqa: E402


def shuffled(count: int, seed: int) -> Any:
    """Random access to epoch after epoch of the numbers below `count`, each in another order, in O(1) memory."""
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()
