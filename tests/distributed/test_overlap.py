"""Gradients that are there after the backward pass only: the same bits as when FSDP waits for each of them."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from areal_ray.distributed.mesh import ParallelDims, init_distributed
from areal_ray.distributed.overlap import LateReduceScatter, overlap, reduce_scatter
from tests.distributed.ranks import run_ranks
from tests.distributed.small import VARIANTS, snapshot, start_engine, train

pytestmark = pytest.mark.distributed

STEPS = 3


class Latest(LateReduceScatter):
    """There is nothing at all in the output before it is waited for, so that whoever reads it reads that."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = 0

    def _start(self, output: torch.Tensor, input: torch.Tensor, **how: Any) -> Any:
        output.fill_(torch.nan)
        self.counted += 1
        return SimpleNamespace(wait=lambda: reduce_scatter(output, input, **how))


class AtOnce(LateReduceScatter):
    def _start(self, output: torch.Tensor, input: torch.Tensor, **how: Any) -> Any:
        reduce_scatter(output, input, **how)
        return SimpleNamespace(wait=lambda: None)


def train_in_three_ways(rank: int, names: list[str]) -> dict[str, Any]:
    return {name: [_train(VARIANTS[name], late) for late in (None, Latest(), AtOnce())] for name in names}


def _train(overrides: list[str], late: LateReduceScatter | None) -> tuple[dict[str, torch.Tensor], list[float], int]:
    engine = start_engine(*overrides)
    if late:
        engine._sharded.late = late
        for module in engine.model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(late)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # it would stand in what a user reads
        losses = [train(engine, seed)["loss"] for seed in range(STEPS)]
    return snapshot(engine), losses, getattr(late, "counted", 0)


def test_late_gradients_are_the_same_to_the_bit() -> None:
    for of_rank in run_ranks(train_in_three_ways, 2, ["plain", "keep_gathered", "recompute", "bfloat16"]):
        for name, ((ours, losses, _), (latest, last, counted), (at_once, first, _)) in of_rank.items():
            assert counted == STEPS * 3, name  # two layers and the rest, once a step whatever the micro-batches
            assert losses == last == first, name
            assert ours.keys() == latest.keys() == at_once.keys()
            for key, value in ours.items():
                assert torch.equal(value, latest[key]), (name, key)
                assert torch.equal(value, at_once[key]), (name, key)


def who_reduces(rank: int, overrides: list[list[str]]) -> list[bool]:
    """Whether the engine's own is what all units reduce with."""
    found = []
    for each in overrides:
        engine = start_engine(*each)
        units = [module for module in engine.model.modules() if isinstance(module, FSDPModule)]
        groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
        assert groups
        mine = {group._reduce_scatter_comm is engine._sharded.late for group in groups}
        found.append(mine == {True})
        assert len(mine) == 1
    return found


def cast_gradients(rank: int, dtypes: list[torch.dtype]) -> list[bool]:
    """Whether overlap has anything to do with a layer of each dtype."""
    found = []
    init_distributed(60, "cpu")
    for dtype in dtypes:
        layer = nn.Linear(4, 4, dtype=dtype)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
        fully_shard(layer, mesh=mesh)
        late = overlap(layer, ParallelDims(mesh, fsdp=mesh, tensor=None, batch_group=None))
        (group,) = layer._get_fsdp_state()._fsdp_param_groups
        found.append(group._reduce_scatter_comm is late)
    return found


def test_gradients_that_would_be_cast_are_left_to_fsdp() -> None:
    assert run_ranks(cast_gradients, 2, [torch.float32, torch.bfloat16]) == [[True, False]] * 2


def test_where_gradients_are_summed_over_replicas_too_fsdp_does_it() -> None:
    assert (
        run_ranks(who_reduces, 2, [VARIANTS["plain"], VARIANTS["hsdp"], VARIANTS["tensor"]])
        == [[True, False, False]] * 2
    )


def who_gives_up(rank: int, overrides: list[list[str]]) -> list[list[bool]]:
    """Of the rest and of each layer, whether they are gathered again for the backward pass."""
    found = []
    for each in overrides:
        units = [module for module in start_engine(*each).model.modules() if isinstance(module, FSDPModule)]
        found.append([unit._get_fsdp_state()._fsdp_param_groups[0]._reshard_after_forward for unit in units])
    return found


def test_what_the_backward_pass_begins_with_is_not_gathered_again() -> None:
    plain, kept = [False, True, False], [False, False, False]
    assert run_ranks(who_gives_up, 2, [VARIANTS["plain"], VARIANTS["keep_gathered"]]) == [[plain, kept]] * 2
