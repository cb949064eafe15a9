"""The loss without logits, of a sharded model on two ranks: tied and untied, with several micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from areal_ray.engine import FSDPEngine, hidden
from areal_ray.engine.objectives import LanguageModeling
from tests.distributed.ranks import run_ranks
from tests.distributed.small import attempt, local_batch, start_engine

pytestmark = pytest.mark.distributed

KINDS = {"tied": [], "untied": ["model.config.tie_word_embeddings=false"], "bfloat16": ["engine.precision=bfloat16"]}
KINDS["capped"] = ["model.config.model_type=gemma2", "model.config.final_logit_softcapping=0.5"]


def both_ways(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo")  # one for all engines
    hidden.CHUNK_BYTES = 4 * 264 * 7  # of the 96 rows of a micro-batch seven at a time
    seen: dict[str, Any] = {}
    for kind, overrides in KINDS.items():
        for loss in ("logits", "chunked"):
            engine = start_engine(*overrides, f"model.loss={loss}")
            assert engine.describe()["loss"] == loss
            seen[f"{kind} {loss}"] = _numbers(engine)
            engine.destroy()
    split = start_engine("engine.mesh.tensor=2")
    seen["tensor"] = split.describe()["loss"]
    seen["tensor chunked"] = attempt(lambda: start_engine("engine.mesh.tensor=2", "model.loss=chunked"))
    return seen


def _numbers(engine: FSDPEngine) -> dict[str, torch.Tensor]:
    """Loss, held-out loss and gradients."""
    batch = local_batch(0, engine)
    evaluated = engine.evaluate(batch, LanguageModeling()).loss
    result = engine.forward_backward(batch, LanguageModeling())
    gradients = {name: p.grad.full_tensor() for name, p in engine.model.named_parameters()}  # type: ignore[union-attr]
    return {"loss": result.loss, "held out": evaluated, "norm": result.grad_norm, **gradients}


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return run_ranks(both_ways, 2)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_logits(seen: dict[str, Any], kind: str) -> None:
    near = 2e-2 if kind == "bfloat16" else 1e-5
    want, got = seen[f"{kind} logits"], seen[f"{kind} chunked"]
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=near, atol=near, check_dtype=False, msg=name)


def test_split_layers_fall_back_to_logits_and_refuse_the_other(seen: dict[str, Any]) -> None:
    assert seen["tensor"] == "logits"
    assert seen["tensor chunked"].error == "ConfigError"
    assert "no rank has the whole output layer" in seen["tensor chunked"].text
