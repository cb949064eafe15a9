"""A rank's part of an initial tensor: the bits of DTensor's own distribution, from the whole or drawn without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from areal_ray.config import ModelConfig, load
from areal_ray.distributed.mesh import ParallelDims
from areal_ray.distributed.parallelize import parallelize
from areal_ray.models import build_model, init, init_weights, initial_parts, materialise, shard_units
from areal_ray.models.initial_parts import draw_part, keep_part
from areal_ray.models.recorded_rule import StandIn
from tests.distributed.meshes import MESHES
from tests.distributed.ranks import run_ranks
from tests.distributed.small import ROOT, differing, snapshot, start_engine

pytestmark = pytest.mark.distributed

SHAPES = [(8, 6), (7, 5), (3, 4), (1, 2), (2, 9)]  # even, uneven, fewer rows than ranks
LAYOUTS: list[tuple[tuple[int, ...], tuple[Any, ...]]] = [
    ((4,), (Shard(0),)),
    ((4,), (Replicate(),)),
    ((2, 2), (Replicate(), Shard(0))),
    ((2, 2), (Shard(0), Shard(1))),
    ((2, 2), (Shard(1), Shard(0))),
    ((2, 2), (Shard(0), Shard(0))),
]


def compare(rank: int) -> list[str]:
    dist.init_process_group("gloo")
    wrong = []
    for sizes, placements in LAYOUTS:
        mesh = init_device_mesh("cpu", sizes)
        for shape in SHAPES:
            full = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
            expected = distribute_tensor(full, mesh, placements, src_data_rank=None)
            parameter = distribute_tensor(torch.full(shape, torch.nan), mesh, placements, src_data_rank=None)
            keep_part(parameter, full)
            if not torch.equal(parameter.to_local(), expected.to_local()):
                wrong.append(f"{sizes} {placements} {shape}")
        for shape in [*SHAPES, (7, 5, 3), (2, 3, 4, 5)]:
            if not _draws_its_part(shape, mesh, placements):
                wrong.append(f"{sizes} {placements} {shape} drawn")
    return wrong


def _draws_its_part(shape: tuple[int, ...], mesh: Any, placements: Any) -> bool:
    initial_parts.BLOCK = 4  # elements: many blocks
    full, rule = torch.empty(shape), StandIn.of(torch.empty(shape))
    nn.init.normal_(rule)
    draw_part(full, rule, "seed")
    parameter = distribute_tensor(torch.full(shape, torch.nan), mesh, placements, src_data_rank=None)
    draw_part(parameter, rule, "seed")
    expected = distribute_tensor(full, mesh, placements, src_data_rank=None)
    return torch.equal(parameter.to_local(), expected.to_local())


def test_a_rank_keeps_the_part_that_dtensor_gives_it() -> None:
    assert run_ranks(compare, 4) == [[]] * 4


def weights(rank: int, meshes: dict[str, list[str]]) -> dict[str, dict[str, torch.Tensor]]:
    """First weights on each mesh, all matrices drawn in parts."""
    init.LARGE, initial_parts.BLOCK = 1000, 300
    found = {}
    for name, overrides in meshes.items():
        engine = start_engine("model.config.vocab_size=266", *overrides)
        found[name] = {key: value for key, value in snapshot(engine).items() if key.startswith("model.")}
    return found


def test_first_weights_that_are_drawn_in_parts_are_the_same_on_any_mesh() -> None:
    """Of 266 rows of embeddings two tensor ranks have 133 each, an odd number for two shards."""
    (one,) = run_ranks(weights, 1, {"fsdp 1": MESHES["fsdp 1"]})
    expected = one["fsdp 1"]
    for name, value in expected.items():
        if value.ndim > 1:
            assert float(value.std()) == pytest.approx(0.02, rel=0.05), name
            assert float(value.mean()) == pytest.approx(0, abs=0.002), name
    for size, names in (
        (2, ["fsdp 2", "tensor 2"]),
        (4, [name for name in MESHES if name not in ("fsdp 1", "fsdp 2", "tensor 2")]),
    ):
        for rank in run_ranks(weights, size, {name: MESHES[name] for name in names}):
            for name in names:
                assert differing(rank[name], expected) == [], name


LAYER = {
    "model_type": "qwen3", "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip


class Count(TorchDispatchMode):
    """Elements that are drawn."""

    drawn = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.normal_.default and not isinstance(args[0], StandIn):
            self.drawn += args[0].numel()
        return func(*args, **(kwargs or {}))


def drawn(rank: int, cases: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """For (rank, ranks, tensor) of each case: elements that the rank draws, and that it has."""
    initial_parts._free_cores = lambda: 1  # a dispatch mode is one of the thread
    found = []
    for number, size, tensor in cases:
        dist.init_process_group("fake", store=FakeStore(), rank=number, world_size=size)
        names = ("shard", "tensor") if tensor > 1 else ("shard",)
        mesh = init_device_mesh("cpu", (size // tensor, tensor)[: len(names)], mesh_dim_names=names)
        fsdp, split = (mesh["shard"], mesh["tensor"]) if tensor > 1 else (mesh, None)
        config = load(str(ROOT / "conf/experiments/tiny.yaml"))
        model = build_model(ModelConfig(config=LAYER))
        units = shard_units(model)
        parallelize(model, units, ParallelDims(mesh, fsdp, split, None), config.engine)
        materialise(model, torch.device("cpu"))
        with Count() as count:
            init_weights(model, 0)
        own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
        found.append((count.drawn, own))
        dist.destroy_process_group()
    return found


def test_a_rank_draws_no_more_than_its_part() -> None:
    """133M parameters: on 1,024 ranks a rank draws what it has and less than two blocks for each of 8 tensors."""
    cases = [(0, 1, 1), (3, 8, 1), (700, 1024, 1), (9, 64, 8)]
    (found,) = run_ranks(drawn, 1, cases)
    (alone, whole), (of_8, own_of_8), (of_1024, own_of_1024), (split, own_of_split) = found
    assert 0.99 * whole < alone <= whole  # all but the norms
    assert of_8 <= 1.05 * own_of_8
    assert of_1024 <= own_of_1024 + 8 * 2 * initial_parts.BLOCK
    assert split <= 4 * own_of_split  # whole rows of the two matrices whose columns are split
