"""With engine.deterministic the same steps give the same bits on a GPU, however the engine computes them."""

from __future__ import annotations

import hashlib

import pytest
import torch

from areal_ray.engine.objectives import next_token_loss, predicted_tokens
from tests.distributed.ranks import run_ranks
from tests.distributed.small import local_batch, start_engine

pytestmark = pytest.mark.distributed

MODES = {
    "float32": ["engine.precision=float32"],
    "bfloat16": ["engine.precision=bfloat16"],
    "recompute": ["engine.precision=bfloat16", "engine.activation_checkpointing=true"],
    "compile": ["engine.precision=bfloat16", "engine.compile=true"],
}


def train_twice(rank: int, device: str) -> dict[str, bool]:
    """By mode, whether two engines have the same weights after the same steps."""
    same = {}
    for mode, overrides in MODES.items():
        if device == "cpu" and mode == "compile":
            continue
        digests = []
        for _ in range(2):
            engine = start_engine("engine.deterministic=true", *overrides)
            assert engine.device.type == device
            for step in range(3):
                engine.train_batch(local_batch(step), next_token_loss, predicted_tokens)
            digest = hashlib.sha256()
            for parameter in engine.model.parameters():
                digest.update(parameter.to_local().detach().cpu().numpy().tobytes())  # type: ignore[attr-defined]
            digests.append(digest.hexdigest())
            engine.destroy()
        same[mode] = digests[0] == digests[1]
    return same


def test_the_same_steps_give_the_same_bits() -> None:
    assert run_ranks(train_twice, 1, "cpu") == [{"float32": True, "bfloat16": True, "recompute": True}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_steps_give_the_same_bits_on_a_gpu() -> None:
    assert run_ranks(train_twice, 1, "cuda", gpu=True) == [dict.fromkeys(MODES, True)]
