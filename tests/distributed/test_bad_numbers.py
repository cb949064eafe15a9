"""A loss that is not a number on one of two ranks: refused by both, left out, gone back from, by the real loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from areal_ray.checkpoint import Catalog
from areal_ray.config import Fault
from areal_ray.engine import FSDPEngine, StepResult
from areal_ray.engine.objectives import LanguageModeling, next_token_loss, predicted_tokens
from tests.distributed.bad_numbers_run import BAD, EVERY, STEPS, Run
from tests.distributed.ranks import run_ranks
from tests.distributed.small import (
    GLOBAL_BATCH,
    VARIANTS,
    differing,
    local_batch,
    snapshot,
    start_engine,
    train,
)

pytestmark = pytest.mark.distributed

REFUSING = ["plain", "hsdp", "keep_gathered", "unclipped"]
LATE = "train.bad_step.lag=1"
NAN_ON_RANK_1 = Fault("nan", 1, BAD)


def train_spoiled(engine: FSDPEngine, seed: int) -> dict[str, Any]:
    """A step with a NaN on the second rank alone."""

    def loss_fn(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return next_token_loss(logits, batch) * (torch.nan if dist.get_rank() == 1 else 1.0)

    return engine.train_batch(local_batch(seed), loss_fn, predicted_tokens)


def train_masked(engine: FSDPEngine, seed: int, loss: float = 1.0) -> StepResult:
    """A step whose update the device decides upon: 1 where its numbers are not finite, as seen by rank 1's loss."""

    class Spoiled(LanguageModeling):
        def loss(self, output: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
            return next_token_loss(output, batch) * (loss if dist.get_rank() == 1 else 1.0), {}

    result = engine.forward_backward(local_batch(seed), Spoiled())
    engine.optimizer_step((~torch.isfinite(result.loss)).float())
    engine.lr_scheduler_step()
    return result


def refuse(rank: int, overrides: list[str]) -> dict[str, Any]:
    """Three steps, the second spoiled, beside two steps of an engine that never saw that batch."""
    seen: dict[str, Any] = {}
    engine, other = start_engine(*overrides), start_engine(*overrides)
    train(engine, seed=0)
    before = snapshot(engine)
    stats = train_spoiled(engine, seed=1)
    seen["numbers"] = [float(stats["loss"]), float(stats["grad_norm"])]
    seen["skipped"] = stats["skipped"]
    seen["changed"] = differing(snapshot(engine), before)
    seen["gradients"] = [name for name, p in engine.model.named_parameters() if p.grad is not None]
    last = train(engine, seed=2)
    train(other, seed=0)
    other._schedule.step += 1
    seen["rates"] = last["lr"], train(other, seed=2)["lr"]
    seen["differs"] = differing(snapshot(engine), snapshot(other))
    before = snapshot(engine)
    seen["numbers of a good step"] = engine.forward_backward(local_batch(3), LanguageModeling()).numbers()
    engine.skip_step()
    seen["changed by a skipped step"] = differing(snapshot(engine), before)
    train_masked(engine, 4, loss=torch.nan)
    seen["changed by a masked step"] = differing(snapshot(engine), before)
    seen["gradients"] += [name for name, p in engine.model.named_parameters() if p.grad is not None]
    other.lr_scheduler_step()
    for each in (engine, other):  # the device's word was about that step alone
        train(each, seed=5)
    masked, plain = train_masked(engine, 6), train(other, seed=6)
    seen["masked differs"] = differing(snapshot(engine), snapshot(other))
    seen["numbers of the last"] = masked.numbers(), (plain["loss"], plain["grad_norm"])
    seen["gradients"] += [name for name, p in engine.model.named_parameters() if p.grad is not None]
    return seen


def refuse_variants(rank: int) -> dict[str, dict[str, Any]]:
    return {name: refuse(rank, VARIANTS[name]) for name in REFUSING}


@pytest.fixture(scope="module")
def refused() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(refuse_variants, 2)


@pytest.mark.parametrize("variant", REFUSING)
def test_a_nan_on_one_rank_is_refused_by_all(refused: list[dict[str, Any]], variant: str) -> None:
    for seen in refused:
        assert np.isnan(seen[variant]["numbers"]).all()
        assert seen[variant]["skipped"] is True
        assert seen[variant]["changed"] == []
        assert seen[variant]["gradients"] == []


@pytest.mark.parametrize("variant", REFUSING)
def test_after_it_the_run_is_one_that_never_saw_that_batch(refused: list[dict[str, Any]], variant: str) -> None:
    for seen in refused:
        assert seen[variant]["rates"][0] == seen[variant]["rates"][1]
        assert seen[variant]["differs"] == []


@pytest.mark.parametrize("variant", REFUSING)
def test_the_numbers_are_the_same_everywhere_and_a_skipped_step_changes_nothing(
    refused: list[dict[str, Any]], variant: str
) -> None:
    for seen in refused:
        assert seen[variant]["numbers of a good step"] == refused[0][variant]["numbers of a good step"]
        assert np.isfinite(seen[variant]["numbers of a good step"]).all()
        assert seen[variant]["changed by a skipped step"] == []


@pytest.mark.parametrize("variant", REFUSING)
def test_an_update_that_the_device_refuses_changes_nothing_and_one_that_it_lets_pass_is_as_any(
    refused: list[dict[str, Any]], variant: str
) -> None:
    for seen in refused:
        assert seen[variant]["changed by a masked step"] == []
        assert seen[variant]["masked differs"] == []
        assert seen[variant]["numbers of the last"][0] == seen[variant]["numbers of the last"][1]


def go_through(rank: int, parent: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    whole = Run(f"{parent}/whole").train()
    skipped = Run(f"{parent}/skipped", "train.bad_step.on_bad=skip", fault=NAN_ON_RANK_1).train()
    back = Run(f"{parent}/back", "train.bad_step.on_bad=rollback", fault=NAN_ON_RANK_1).train()
    seen["began"] = whole.began, skipped.began, back.began
    seen["restored"] = [name for name, _ in back.restored]
    seen["restored differs"] = differing(back.restored[0][1], whole.weights[EVERY + 1][0])
    late = Run(f"{parent}/late", LATE, "train.bad_step.on_bad=skip", fault=NAN_ON_RANK_1).train()
    # No line and no copy is due after the bad step, or its verdict would be asked for at once.
    nothing_due = ["logging.every_steps=3", "checkpoint.memory_every_steps=null"]
    back_late = ["train.bad_step.on_bad=rollback", *nothing_due]
    late_back = Run(f"{parent}/late_back", LATE, *back_late, fault=NAN_ON_RANK_1).train()
    seen["late"] = [run.standing()[1:] for run in (late, late_back, skipped)]
    seen["late differs"] = [differing(run.standing()[0], skipped.standing()[0]) for run in (late, late_back)]
    seen["late began"] = late.began, late_back.began
    seen["until then"] = [
        differing(weights, whole.weights[step][0])
        for run in (skipped, back)
        for step in range(1, BAD + 1)
        for weights in run.weights[step]
    ]
    seen["bad step changed"] = differing(skipped.weights[BAD + 1][0], skipped.weights[BAD][0])
    seen["later"] = differing(skipped.standing()[0], whole.standing()[0])
    seen["back differs from skipped"] = differing(back.standing()[0], skipped.standing()[0])
    seen["states"] = [run.standing()[1:] for run in (skipped, back)]
    # A new attempt whose fault has happened, of a run whose last checkpoint is older than the bad step.
    if rank == 0:
        Path(f"{parent}/skipped/step-{STEPS:08d}.a1").rename(f"{parent}/set_aside")
    dist.barrier()
    again = Run(f"{parent}/skipped", attempt=2, fault=NAN_ON_RANK_1)
    again.restore.at_start("")
    seen["again from"] = Catalog.name(again.job.progress.step, 1)
    again.train()
    seen["again differs"] = differing(again.standing()[0], skipped.standing()[0])
    seen["states"].append(again.standing()[1:])
    return seen


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("runs")
    for name in ("whole", "skipped", "back", "late", "late_back"):
        (parent / name).mkdir()
    return parent


@pytest.fixture(scope="module")
def gone(parent: Path) -> list[dict[str, Any]]:
    return run_ranks(go_through, 2, str(parent))


def test_a_skipped_step_leaves_the_weights_and_the_run_goes_on(gone: list[dict[str, Any]]) -> None:
    for seen in gone:
        assert seen["began"][0] == seen["began"][1] == list(range(1, STEPS + 1))
        assert seen["bad step changed"] == []
        assert seen["later"]


def test_going_back_waits_for_the_save_that_is_under_way_and_restores_it(gone: list[dict[str, Any]]) -> None:
    for seen in gone:
        assert seen["restored"] == [f"step-{EVERY:08d}.a1"]
        assert seen["restored differs"] == []
        assert seen["began"][2] == [*range(1, BAD + 1), *range(EVERY + 1, STEPS + 1)]


def test_up_to_the_bad_step_all_runs_are_the_undisturbed_one(gone: list[dict[str, Any]]) -> None:
    for seen in gone:
        assert seen["until then"] == [[]] * (2 * BAD + 1)


def test_going_back_ends_where_leaving_out_does(gone: list[dict[str, Any]]) -> None:
    for seen in gone:
        assert seen["back differs from skipped"] == []


def test_a_new_attempt_leaves_the_step_out_again_though_its_numbers_are_good_now(gone: list[dict[str, Any]]) -> None:
    for seen in gone:
        assert seen["again from"] == f"step-{EVERY:08d}.a1"
        assert seen["again differs"] == []
        assert seen["states"][0] == seen["states"][1] == seen["states"][2]
        assert seen["states"][0][0]["left_out"] == [BAD]
        assert len(seen["states"][0][0]["losses"]) == STEPS - 1


def test_a_verdict_that_comes_a_step_later_ends_in_the_same_bits(gone: list[dict[str, Any]]) -> None:
    for seen in gone:
        assert seen["late differs"] == [[], []]
        assert seen["late"][0] == seen["late"][1] == seen["late"][2]
        assert seen["late began"] == (
            [*range(1, STEPS + 1)],
            [*range(1, BAD + 2), *range(EVERY + 1, STEPS + 1)],
        )


def test_the_ledger_has_each_bad_step_once_with_its_samples(gone: list[dict[str, Any]], parent: Path) -> None:
    runs = (("skipped", "skip"), ("back", "rollback"), ("late", "skip"), ("late_back", "rollback"))
    for name, action in runs:
        events = [json.loads(line) for line in (parent / name / "events.jsonl").read_text().splitlines()]
        (event,) = [event for event in events if event["event"] == "bad_step"]
        assert (event["step"], event["action"], event["loss"], event["grad_norm"]) == (BAD, action, "nan", "nan")
        assert (event["first_sample"], event["samples"]) == ((BAD - 1) * GLOBAL_BATCH, GLOBAL_BATCH)
