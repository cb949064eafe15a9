"""Losses without all logits at once: what is summed, and how gradients are made, a chunk of rows at a time.

Imports nothing of this package.
"""

from areal_ray.engine.chunked.row_losses import CrossEntropyRows, DistilledRows, RowLoss
from areal_ray.engine.chunked.sums import ChunkedLogProbs, ChunkedSums

__all__ = ["ChunkedLogProbs", "ChunkedSums", "CrossEntropyRows", "DistilledRows", "RowLoss"]
