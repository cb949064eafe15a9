"""Randomness of a step, counted instead of stored."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def reseed(seed: int, step: int, dp_rank: int) -> None:
    """Make all randomness of a step a function of (seed, step, data-parallel rank), so that none needs to be saved.

    The ranks of a tensor group draw the same: what they hold whole, they must drop out alike. (So heads at the same
    place in two ranks' parts have the same attention dropout.)
    """
    value = int.from_bytes(hashlib.sha256(f"{seed}/{step}/{dp_rank}".encode()).digest()[:8], "big") >> 1
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)
