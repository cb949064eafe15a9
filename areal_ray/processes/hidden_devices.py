"""Preparation without a GPU: which one is a worker's own is not known yet, and CUDA is started once in a process.

As CUDA reads CUDA_VISIBLE_DEVICES when it starts, a process that has touched it computes on whatever was visible then,
keeps half a gigabyte on the first GPU, and no fork of it can use any.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# None visible, and torch looks at the variable (or at NVML) when it is asked for one, not into CUDA.
_HIDE = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def touched() -> bool:
    """Whether torch has started CUDA in this process, or this is a fork of one in which it had."""
    torch = sys.modules.get("torch")
    return torch is not None and (torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork())


@contextmanager
def hidden_devices() -> Iterator[None]:
    """Hide all GPUs from what is done in the block.

    A variable that somebody else sets meanwhile (Ray, which gives a process its GPU) stays as it was set.

    Raises:
        RuntimeError: if torch has started CUDA in the block all the same.
    """
    before, was_touched = {name: os.environ.get(name) for name in _HIDE}, touched()
    os.environ.update(_HIDE)
    try:
        yield
    finally:
        hidden = all(os.environ.get(name) == value for name, value in _HIDE.items())  # and nobody has begun to train
        for name, value in before.items():
            if os.environ.get(name) != _HIDE[name]:
                continue
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    if hidden and touched() and not was_touched:
        raise RuntimeError("the preparation has started CUDA: this process and its forks could use no GPU")
