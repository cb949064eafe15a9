"""Reproducible steps: randomness that is counted instead of stored, and torch's switches of a whole process."""

from __future__ import annotations

import hashlib
import os
import random

import numpy as np
import torch

from areal_ray.config import EngineConfig

# Read by cuBLAS and NCCL when they are first used. Matrix products take a workspace of a fixed size, or concurrent
# streams would share one in any order; sums over ranks go round a ring, whose order is fixed, as that of NVLS and trees
# is not.
_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_NVLS_ENABLE": "0"}


def set_process_switches(config: EngineConfig) -> None:
    """Set what `engine.deterministic` and `engine.tf32` ask for; before the first call of CUDA and NCCL.

    A backward pass of flash attention then adds in a fixed order, and one that cannot is not chosen. An operation that
    has no deterministic implementation raises RuntimeError. What the environment says already is left as it is.

    See "Reproducibility" in PyTorch's documentation, and NCCL's of its environment variables.
    """
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    if not config.deterministic:
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    # Filling new memory, which would be the default then, costs a pass over it, and only hides mistakes.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False  # chooses by timing
    torch.backends.cudnn.deterministic = True
    if config.compile:
        _compile_without_timing()


def _compile_without_timing() -> None:
    """Inductor chooses kernels by rule, where this torch knows how to."""
    from torch._inductor import config

    if hasattr(config, "deterministic"):
        config.deterministic = True


def reseed(seed: int, step: int, dp_rank: int) -> None:
    """Make all randomness of a step a function of (seed, step, data-parallel rank), so that none needs to be saved.

    The ranks of a tensor group draw the same: what they hold whole, they must drop out alike. (So heads at the same
    place in two ranks' parts have the same attention dropout.)
    """
    value = int.from_bytes(hashlib.sha256(f"{seed}/{step}/{dp_rank}".encode()).digest()[:8], "big") >> 1
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)
