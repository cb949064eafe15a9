"""FSDPEngine against a plain PyTorch loop on the same model, at one and two ranks and in every mode it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tests.distributed.plain_loop import RATES, STEPS, reference
from tests.distributed.ranks import run_ranks
from tests.distributed.small import (
    LENGTHS,
    SEQ_LEN,
    VARIANTS,
    VOCABULARY,
    differing,
    evaluate,
    global_batch,
    local_batch,
    snapshot,
    start_engine,
    train,
)

pytestmark = pytest.mark.distributed

EXACT = ["plain", "hsdp", "keep_gathered", "recompute", "tensor"]  # all of them the same float32 computation


def train_variants(rank: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """Train, evaluating after the first step; what there was to see of each variant."""
    return {name: _observe(VARIANTS[name]) for name in names}


def _observe(overrides: list[str]) -> dict[str, Any]:
    engine = start_engine(*overrides)
    seen: dict[str, Any] = {"mesh": engine.describe()["mesh"], "initial": snapshot(engine), "layer_calls": 0}
    seen["share"] = sum(_local(p).numel() for p in engine.model.parameters()) / sum(
        p.numel() for p in engine.model.parameters()
    )

    def count(*_: Any) -> None:
        seen["layer_calls"] += 1

    hook = engine.model.model.layers[0].mlp.register_forward_pre_hook(count)
    seen["steps"] = [train(engine, seed=0)]
    hook.remove()
    seen["after 1"] = snapshot(engine)
    seen["eval"] = evaluate(engine, seed=100)
    seen["logits"] = engine.forward(local_batch(100, engine)).cpu()
    seen["after eval"] = snapshot(engine)
    seen["grads after eval"] = [name for name, p in engine.model.named_parameters() if p.grad is not None]
    seen["steps"] += [train(engine, seed=step) for step in range(1, STEPS)]
    seen["after 3"] = snapshot(engine)
    seen["steps"].append(train(engine, seed=STEPS))
    return seen


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_trained_alike(seen: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-5) -> None:
    """Loss and gradient norm of every step, and the parameters after 1 and 3 of them."""
    for step, (mine, right) in enumerate(zip(seen["steps"][:STEPS], expected["steps"], strict=True)):
        assert mine["loss"] == pytest.approx(right["loss"], rel=rtol), f"loss of step {step}"
        assert mine["grad_norm"] == pytest.approx(right["grad_norm"], rel=10 * rtol), f"grad_norm of step {step}"
    for when in ("after 1", "after 3"):
        for name, right in expected[when].items():
            # Adam divides by the gradient's size, so where that is next to nothing an update keeps few digits.
            torch.testing.assert_close(
                seen[when][name], right, rtol=rtol, atol=0.3 * rtol, msg=lambda m, n=name, w=when: f"{n} {w}: {m}"
            )


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, Any]]:
    return run_ranks(train_variants, 1, ["plain"])[0]


@pytest.fixture(scope="module")
def two() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(train_variants, 2, list(VARIANTS))


@pytest.fixture(scope="module")
def expected(one: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return reference(one["plain"]["initial"])


def test_weighting_by_tokens_matters_in_these_batches(expected: dict[str, Any]) -> None:
    """Otherwise the tests below could not tell a mean over tokens from a mean over ranks or micro-batches."""
    assert max(LENGTHS[1::2]) < max(LENGTHS[::2])
    logits, batch = expected["logits"], global_batch(100)
    nll = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    counts = batch["attention_mask"][:, 1:]
    by_rows = torch.nan_to_num((nll * counts).sum(1) / counts.sum(1)).mean()
    assert abs(float(by_rows) - expected["eval"]) > 0.01


def test_one_rank_trains_as_plain_pytorch_does(one: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_trained_alike(one["plain"], expected)


@pytest.mark.parametrize("variant", EXACT)
def test_two_ranks_train_as_plain_pytorch_does(
    two: list[dict[str, Any]], expected: dict[str, Any], variant: str
) -> None:
    for rank in two:
        assert_trained_alike(rank[variant], expected)


def test_gradient_norm_is_reported_before_clipping_and_clipping_can_be_off(
    two: list[dict[str, Any]], one: dict[str, Any]
) -> None:
    expected = reference(one["plain"]["initial"], clip=None)
    assert expected["steps"][0]["grad_norm"] > 0.5
    assert_trained_alike(two[0]["unclipped"], expected)


def test_first_weights_do_not_depend_on_the_world_size(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    initial = one["plain"]["initial"]
    assert all(float(t.std()) > 0 for name, t in initial.items() if name.startswith("model.") and t.ndim > 1)
    for rank in two:
        for variant in VARIANTS:
            assert differing(rank[variant]["initial"], initial) == []


def test_optimizer_state_exists_before_the_first_step(one: dict[str, Any]) -> None:
    state = {name: t for name, t in one["plain"]["initial"].items() if name.startswith("optim.")}
    parameters = sum(name.startswith("model.") for name in one["plain"]["initial"])
    assert len(state) == 3 * parameters
    assert all(not tensor.any() for tensor in state.values())


def test_all_ranks_report_the_same_numbers(two: list[dict[str, Any]]) -> None:
    for variant in VARIANTS:
        assert two[0][variant]["steps"] == two[1][variant]["steps"]
        assert two[0][variant]["eval"] == two[1][variant]["eval"]


def test_the_rate_follows_the_schedule(two: list[dict[str, Any]]) -> None:
    assert [step["lr"] for step in two[0]["plain"]["steps"]] == pytest.approx(RATES)
    assert [step["lr"] for step in two[0]["unclipped"]["steps"]] == pytest.approx([1e-3, 2e-3, 2e-3, 2e-3])


def test_evaluation_is_the_mean_over_tokens_and_changes_nothing(
    one: dict[str, Any], two: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    for seen in (one["plain"], *(rank["plain"] for rank in two)):
        assert seen["eval"]["loss"] == pytest.approx(expected["eval"], rel=1e-5)
        assert seen["eval"]["weight"] == sum(length - 1 for length in LENGTHS)
        assert differing(seen["after eval"], seen["after 1"]) == []
        assert seen["grads after eval"] == []


def test_forward_returns_the_logits_of_this_ranks_rows(two: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    attended = global_batch(100)["attention_mask"].bool()
    for rank, seen in enumerate(two):
        logits = seen["plain"]["logits"]
        assert logits.shape == (len(LENGTHS) // 2, SEQ_LEN, VOCABULARY)
        assert not logits.requires_grad
        mine = attended[rank::2]
        torch.testing.assert_close(logits[mine], expected["logits"][rank::2][mine], rtol=1e-5, atol=1e-5)


def test_the_mesh_shards_or_replicates_as_configured(two: list[dict[str, Any]]) -> None:
    assert two[0]["plain"]["mesh"] == {"shard": 2}
    assert two[0]["hsdp"]["mesh"] == {"replicate": 2, "shard": 1}
    assert two[0]["tensor"]["mesh"] == {"shard": 1, "tensor": 2}
    for rank in two:
        assert rank["plain"]["share"] == pytest.approx(0.5, abs=0.01)
        assert rank["hsdp"]["share"] == 1
        assert rank["tensor"]["share"] == pytest.approx(0.5, abs=0.01)  # all but the norms


def test_activation_checkpointing_computes_layers_twice(two: list[dict[str, Any]]) -> None:
    assert two[0]["plain"]["layer_calls"] == 2  # two micro-batches
    assert two[0]["recompute"]["layer_calls"] == 4


def test_bfloat16_computes_near_and_keeps_float32_weights(two: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    seen = two[0]["bfloat16"]
    for mine, right in zip(seen["steps"][:STEPS], expected["steps"], strict=True):
        assert mine["loss"] == pytest.approx(right["loss"], rel=0.01)
        assert mine["grad_norm"] == pytest.approx(right["grad_norm"], rel=0.1)
    assert seen["steps"] != two[0]["plain"]["steps"]
    assert seen["logits"].dtype == torch.bfloat16
    assert {tensor.dtype for tensor in seen["after 3"].values()} == {torch.float32}
    for name, right in expected["after 3"].items():
        assert float((seen["after 3"][name] - right).norm() / right.norm()) < 0.05, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_as_plain_pytorch_does() -> None:
    (seen,) = run_ranks(train_variants, 1, ["plain", "recompute", "bfloat16"], gpu=True)
    expected = reference(seen["plain"]["initial"])
    assert_trained_alike(seen["plain"], expected, rtol=1e-3)
    assert_trained_alike(seen["recompute"], expected, rtol=1e-3)
    assert seen["plain"]["eval"]["loss"] == pytest.approx(expected["eval"], rel=1e-4)
    for mine, right in zip(seen["bfloat16"]["steps"][:STEPS], expected["steps"], strict=True):
        assert mine["loss"] == pytest.approx(right["loss"], rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_starts_with_the_weights_of_a_cpu(one: dict[str, Any]) -> None:
    (seen,) = run_ranks(train_variants, 1, ["plain"], gpu=True)
    assert differing(seen["plain"]["initial"], one["plain"]["initial"]) == []
