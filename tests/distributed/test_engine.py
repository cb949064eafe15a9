"""FSDPEngine against a plain PyTorch loop on the same model, at one and two ranks and in every mode it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from areal_ray.engine import SaveLoadMeta
from tests.distributed.ranks import run_ranks
from tests.distributed.small import (
    LENGTHS,
    SEQ_LEN,
    VOCABULARY,
    differing,
    evaluate,
    global_batch,
    local_batch,
    small_config,
    snapshot,
    start_engine,
    train,
)

pytestmark = pytest.mark.distributed

VARIANTS = {
    "plain": [],
    "hsdp": ["engine.mesh.replicate=2", "engine.mesh.shard=1"],
    "keep_gathered": ["engine.reshard_after_forward=false"],
    "recompute": ["engine.activation_checkpointing=true"],
    "tensor": ["engine.mesh.tensor=2"],
    "unclipped": ["optim.clip_grad_norm=null", "optim.schedule=constant"],
    "bfloat16": ["engine.precision=bfloat16"],
}
EXACT = ["plain", "hsdp", "keep_gathered", "recompute", "tensor"]  # all of them the same float32 computation
RATES = [1e-3, 2e-3, 2e-3, 1.1e-3]  # two steps of warm-up, then a cosine over two from 2e-3 down to 2e-4
STEPS = 3


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


def reference(initial: dict[str, torch.Tensor], clip: float | None = 0.5) -> dict[str, Any]:
    """The same training, written down plainly: one process, whole batches, no package code but the config's values."""
    config = small_config()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.model.config), attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial[f"model.{name}"])
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    seen: dict[str, Any] = {"steps": []}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        loss = _reference_loss(model, global_batch(step))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip if clip is not None else float("inf"))
        optimizer.step()
        seen["steps"].append({"loss": loss.item(), "grad_norm": norm.item(), "lr": RATES[step]})
        seen[f"after {step + 1}"] = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters()}
        if step == 0:
            seen["eval"] = _reference_loss(model, global_batch(100)).item()
            seen["logits"] = model(**global_batch(100)).logits.detach()
    return seen


def _reference_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over all predicted tokens of the global batch."""
    log_p = torch.log_softmax(model(**batch).logits[:, :-1], dim=-1)
    nll = -log_p.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    counts = batch["attention_mask"][:, 1:]
    return (nll * counts).sum() / counts.sum()


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
