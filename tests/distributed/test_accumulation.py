"""Gradients of micro-batches that add up in shards: the sums of an unsharded accumulation, in the memory of a shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from areal_ray.distributed import accumulation
from areal_ray.distributed.overlap import LateReduceScatter
from areal_ray.engine import FSDPEngine
from areal_ray.engine.objectives import LanguageModeling, next_token_loss, predicted_tokens
from tests.distributed.ranks import run_ranks
from tests.distributed.small import VARIANTS, differing, local_batch, snapshot, start_engine, train

pytestmark = pytest.mark.distributed

STEPS = 3
SMALLEST = "train.micro_batch_size=1"
FROZEN = ["optim.groups=[{pattern: embed_tokens, freeze: true}, {pattern: layers.0, freeze: true}]"]
OF_TWO = {name: [*overrides, SMALLEST] for name, overrides in VARIANTS.items() if name != "unclipped"}
OF_TWO |= {"uneven": [], "frozen": [*FROZEN, SMALLEST], "one micro-batch": ["train.micro_batch_size=4"]}
FOUR = [SMALLEST, "cluster.num_workers=4"]
OF_FOUR = {
    "hsdp 2x2": [*FOUR, "engine.mesh.replicate=2"],
    "hsdp 2x1 tensor 2": [*FOUR, "engine.mesh.replicate=2", "engine.mesh.tensor=2"],
}


class Watching(LanguageModeling):
    """Notes before each loss how many bytes of gradients the earlier micro-batches have left on this rank."""

    def __init__(self, engine: FSDPEngine) -> None:
        self._engine, self.left = engine, list[int]()

    def loss(
        self, output: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        self.left.append(held(self._engine))
        return super().loss(output, batch)


def held(engine: FSDPEngine) -> int:
    """Bytes of gradients on this rank, whole ones and shards."""
    tensors = []
    for module in engine.model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                tensors.append(group._partial_reduce_output)
                for each in group.fsdp_params:
                    tensors += [each.sharded_param.grad, each.unsharded_accumulated_grad]
                    tensors.append(each.unsharded_param.grad if hasattr(each, "_unsharded_param") else None)
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors if tensor is not None]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in local}.values())


def both_ways(rank: int, variants: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    return {
        name: {how: observe([*overrides, f"engine.accumulate={how}"]) for how in ("unsharded", "sharded")}
        for name, overrides in variants.items()
    }


def observe(overrides: list[str]) -> dict[str, Any]:
    engine = start_engine(*overrides)
    steps = [train(engine, seed) for seed in range(STEPS)]
    seen = {"steps": steps, "tensors": snapshot(engine), "accumulate": engine.describe()["accumulate"]}
    watching = Watching(engine)
    engine.forward_backward(local_batch(STEPS, engine), watching)
    seen["left"], seen["after"] = watching.left, held(engine)
    engine.skip_step()
    seen["whole"] = 4 * sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    assert held(engine) == 0
    # And a step after one that was dropped has nothing of it.
    seen["steps"].append(train(engine, STEPS))
    return seen


@pytest.fixture(scope="module")
def seen() -> dict[str, list[dict[str, Any]]]:
    found = {}
    for size, variants in ((2, OF_TWO), (4, OF_FOUR)):
        ranks = run_ranks(both_ways, size, variants)
        found |= {name: [rank[name] for rank in ranks] for name in variants}
    return found


@pytest.mark.parametrize("name", [*OF_TWO, *OF_FOUR])
def test_a_run_is_the_same_but_for_rounding(seen: dict[str, list[dict[str, Any]]], name: str) -> None:
    rtol = 2e-3 if name == "bfloat16" else 1e-5
    for rank in seen[name]:
        for mine, right in zip(rank["sharded"]["steps"], rank["unsharded"]["steps"], strict=True):
            assert mine["loss"] == pytest.approx(right["loss"], rel=rtol)
            assert mine["grad_norm"] == pytest.approx(right["grad_norm"], rel=10 * rtol)
        for how in ("sharded", "unsharded"):
            assert rank[how]["accumulate"] == how
            assert rank[how]["steps"] == seen[name][0][how]["steps"]
            assert differing(rank[how]["tensors"], seen[name][0][how]["tensors"]) == []


def test_a_single_micro_batch_has_the_same_bits(seen: dict[str, list[dict[str, Any]]]) -> None:
    for rank in seen["one micro-batch"]:
        assert rank["sharded"]["steps"] == rank["unsharded"]["steps"]
        assert differing(rank["sharded"]["tensors"], rank["unsharded"]["tensors"]) == []


@pytest.mark.parametrize("name", ["plain", "uneven", "recompute", "keep_gathered", "frozen", "hsdp 2x2"])
def test_between_micro_batches_a_rank_holds_its_shard_only(seen: dict[str, list[dict[str, Any]]], name: str) -> None:
    for rank in seen[name]:
        sharded, unsharded = rank["sharded"], rank["unsharded"]
        assert len(sharded["left"]) > 1
        assert sharded["left"][0] == unsharded["left"][0] == 0
        for left in sharded["left"][1:]:
            assert left == pytest.approx(sharded["whole"] / 2, rel=0.02)
        for left in unsharded["left"][1:]:
            assert left >= unsharded["whole"]
        assert sharded["after"] == unsharded["after"]


def test_one_rank_has_the_same_bits_either_way() -> None:
    (rank,) = run_ranks(both_ways, 1, {"plain": [SMALLEST]})
    assert rank["plain"]["sharded"]["steps"] == rank["plain"]["unsharded"]["steps"]
    assert differing(rank["plain"]["sharded"]["tensors"], rank["plain"]["unsharded"]["tensors"]) == []


def go_on(rank: int) -> list[str]:
    """How an engine that reads `auto` accumulates, for each thing that a checkpoint may say."""
    found = []
    for recorded in (None, "sharded", "unsharded"):
        engine = FSDPEngine(start_engine(SMALLEST)._config)
        engine.initialize(accumulate=recorded)
        engine.train_batch(local_batch(0, engine), next_token_loss, predicted_tokens)
        found.append(engine.describe()["accumulate"])
    return found


def test_a_run_goes_on_as_its_checkpoint_says() -> None:
    assert run_ranks(go_on, 2) == [["unsharded", "sharded", "unsharded"]] * 2


class Experts(nn.Module):
    """Which of its two experts it uses, the caller says."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        self.head = nn.Linear(4, 1, bias=False)

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return self.head(self.experts[expert](x)).mean()


def backward(model: nn.Module, rank: int, expert: int, share: float) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * rank + expert))
    (model(x, expert) * share).backward()


def use_experts(rank: int) -> dict[str, float]:
    """Both ranks use both experts, in another order: how far their gradients are from those of one process."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    alone, model = Experts(), Experts()
    model.load_state_dict(alone.state_dict())
    for each in range(2):
        for expert in range(2):
            backward(alone, each, expert, 0.5)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    late = LateReduceScatter()
    for number, expert in enumerate((rank, 1 - rank)):
        accumulation.reduce_after(model, late, "sharded", first=number == 0, last=number == 1)
        backward(model, rank, expert, 1.0)
    late.wait()
    right = dict(alone.named_parameters())
    return {name: float((p.grad.full_tensor() - right[name].grad).abs().max()) for name, p in model.named_parameters()}


def test_ranks_that_use_different_experts_in_a_micro_batch_do_not_mix_their_gradients() -> None:
    for far in run_ranks(use_experts, 2):
        assert max(far.values()) < 1e-6
