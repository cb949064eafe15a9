"""Dropout draws the same when a step is repeated, and not the same on another rank or step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from areal_ray.engine import SaveLoadMeta
from tests.distributed.ranks import run_ranks
from tests.distributed.small import differing, evaluate, global_batch, snapshot, start_engine, train

pytestmark = pytest.mark.distributed


def train_with_dropout(rank: int, path: str) -> dict[str, Any]:
    """A step, and once more from the same restored state, the random generators disturbed in between."""
    engine = start_engine("model.config.attention_dropout=0.1")
    train(engine, seed=0)
    engine.save(SaveLoadMeta(path))
    seen: dict[str, Any] = {"without": [evaluate(engine, seed=1)["loss"] for _ in range(2)]}
    seen["first"] = train(engine, seed=1), snapshot(engine)
    torch.manual_seed(1234 + rank)
    engine.load(SaveLoadMeta(path))
    torch.rand(rank + 1)
    seen["again"] = train(engine, seed=1), snapshot(engine)
    seen["losses"] = _losses_of_equal_rows()
    return seen


def _losses_of_equal_rows() -> list[float]:
    """Of two steps, the rows and weights the same on every rank and in every step: dropout alone tells them apart."""
    engine = start_engine("model.config.attention_dropout=0.1", "optim.lr=1e-30", "train.micro_batch_size=8")
    losses: list[float] = []

    def loss_fn(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = logits.float().square().mean()
        losses.append(loss.item())
        return loss

    for _ in range(2):
        engine.train_batch(global_batch(0), loss_fn, lambda batch: batch["attention_mask"].sum())
    return losses


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(train_with_dropout, 2, str(tmp_path_factory.mktemp("dropout") / "checkpoint"))


def test_a_step_with_dropout_repeats_bit_for_bit(dropped: list[dict[str, Any]]) -> None:
    for seen in dropped:
        (first, after_first), (again, after_again) = seen["first"], seen["again"]
        assert seen["without"][0] == seen["without"][1], "evaluation must not drop anything out"
        assert abs(first["loss"] - seen["without"][0]) > 1e-5, "dropout does nothing, so this test shows nothing"
        assert again == first
        assert differing(after_again, after_first) == []


def test_dropout_differs_from_rank_to_rank_and_step_to_step(dropped: list[dict[str, Any]]) -> None:
    assert len({loss for seen in dropped for loss in seen["losses"]}) == 4
