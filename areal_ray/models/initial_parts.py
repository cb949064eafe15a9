"""A rank's part of an initial tensor: taken from the whole, or drawn without the whole.

A tensor that is drawn in parts is cut into blocks of rows, and each block has a random generator of its own, seeded by
(seed, name of the parameter, number of the block). Blocks depend on the shape of the whole tensor only, so its values
are the same for any world size, mesh and device.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from areal_ray.models.recorded_rule import StandIn

# Elements of a block: half a millisecond of drawing, beside which its overhead is small. Of a matrix with rows of 8,192
# elements it has 8 of them, so that even where 1,024 ranks share 8,192 rows nobody draws one for another.
BLOCK = 2**16
_THREADS = 8  # at most


def seed_of(text: str) -> int:
    """A seed for a random generator."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def keep_part(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Copy this rank's part of a tensor that every rank has; only the part goes to the device."""
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(_part(full, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(full)


def draw_part(parameter: torch.Tensor, rule: StandIn, name: str) -> None:
    """Draw this rank's part of a tensor by the steps of a rule, in several threads where there are cores for them.

    Time and memory grow with the part: whole rows are drawn of which a rank has any columns, and whole blocks.

    Args:
        parameter: of the rank.
        rule: was done to a stand-in of the whole parameter.
        name: with the seed in it.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    rows, columns = _places(parameter)
    shape = len(rows), len(columns)
    in_place = local.device.type == "cpu" and local.is_contiguous()
    part = local.view(shape) if in_place else torch.empty(shape, dtype=local.dtype)
    ascending = bool((rows[1:] > rows[:-1]).all())
    in_order, order = (rows, torch.arange(len(rows))) if ascending else rows.sort()
    width = rule.shape[-1] if rule.ndim > 1 else 1
    total, height = rule.numel() // width, max(1, BLOCK // width)

    @torch.no_grad()  # of a thread
    def draw(blocks: Sequence[int]) -> None:
        for block in blocks:
            first, end = block * height, min((block + 1) * height, total)
            low, high = torch.searchsorted(in_order, torch.tensor([first, end])).tolist()
            all_of_it = ascending and high - low == end - first and len(columns) == width
            values = part[low:high] if all_of_it else torch.empty(end - first, width, dtype=local.dtype)
            generator = torch.Generator().manual_seed(seed_of(f"{name}/{block}"))
            for step in rule.steps:
                step.apply(values, first, generator)
            if not all_of_it:
                mine = values[in_order[low:high] - first]
                part[order[low:high]] = mine if len(columns) == width else mine[:, columns]

    blocks = torch.unique_consecutive(in_order // height).tolist()
    threads = min(_free_cores(), _THREADS, len(blocks))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, [blocks[i::threads] for i in range(threads)]))
    else:
        draw(blocks)
    if not in_place:
        local.copy_(part.view(local.shape))


def _free_cores() -> int:
    """This rank's share of the cores that its process may use."""
    return len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _places(parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the rows and columns of this rank's part, in its order; of rows as `StandIn` counts them."""
    rows, *others = (_indices(parameter, dim) for dim in range(parameter.ndim))
    columns = others.pop() if others else torch.zeros(1, dtype=torch.long)
    for dim, indices in enumerate(others, start=1):
        rows = (rows[:, None] * parameter.shape[dim] + indices).flatten()
    return rows, columns


def _indices(parameter: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's part of a dimension."""
    every = torch.arange(parameter.shape[dim])
    if not isinstance(parameter, DTensor):
        return every
    line = every.view([-1 if each == dim else 1 for each in range(parameter.ndim)])
    # By the attribute: where FSDP shards what tensor parallelism has split, it is a placement that says it is no shard.
    along = [each if getattr(each, "dim", None) == dim else Replicate() for each in parameter.placements]
    return _part(line, parameter.device_mesh, along).flatten().cpu()


def _part(full: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> torch.Tensor:
    if all(type(placement) in (Shard, Replicate) for placement in placements):
        part = full
        for dim, placement in enumerate(placements):
            if isinstance(placement, Shard):
                part = _chunk(part, placement.dim, mesh.size(dim), mesh.get_local_rank(dim))
        return part
    # Tensor parallelism and FSDP over one dimension: parts that are no slices. src_data_rank=None: nothing is sent.
    return distribute_tensor(full.to(mesh.device_type), mesh, placements, src_data_rank=None).to_local()


def _chunk(tensor: torch.Tensor, dim: int, count: int, index: int) -> torch.Tensor:
    """One of `count` chunks as DTensor makes them: the last ones may be smaller, or empty."""
    chunks = torch.chunk(tensor, count, dim)
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)
