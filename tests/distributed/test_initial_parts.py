"""A rank's part of an initial tensor: the bits of DTensor's own distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from areal_ray.models.init import _keep_part
from tests.distributed.ranks import run_ranks

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
            _keep_part(parameter, full)
            if not torch.equal(parameter.to_local(), expected.to_local()):
                wrong.append(f"{sizes} {placements} {shape}")
    return wrong


def test_a_rank_keeps_the_part_that_dtensor_gives_it() -> None:
    assert run_ranks(compare, 4) == [[]] * 4
