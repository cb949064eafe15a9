"""Parts of tensors brought from one layout to another, each box straight to who needs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from areal_ray.checkpoint.memory import reshard
from areal_ray.checkpoint.memory.parts import Part, decode, encode, parts_of
from areal_ray.checkpoint.memory.reshard import Reshard
from areal_ray.checkpoint.tree import flatten, local
from areal_ray.distributed.point_to_point import PointToPoint
from tests.distributed.ranks import run_ranks
from tests.distributed.small import differing, snapshot, start_engine, train

pytestmark = pytest.mark.distributed
RANKS = 4
LAYOUTS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "two copies": ((2, 2), [Replicate(), Shard(0)]),
    "both": ((2, 2), [Shard(0), Shard(1)]),
    "whole": ((4,), [Replicate()]),
}
SHAPES = [(7, 5), (16, 3), (2, 9), (33, 40)]  # some ranks have less than others, or nothing


def tensors(layout: str, fill: bool) -> dict[str, torch.Tensor]:
    """DTensors of several types, a plain one and a number; zeros if they are to be filled."""
    shape, placements = LAYOUTS[layout]
    mesh, made = init_device_mesh("cpu", shape), {}
    for number, size in enumerate(SHAPES):
        dtype = (torch.float32, torch.bfloat16, torch.int64)[number % 3]
        whole = torch.arange(size[0] * size[1]).view(size).to(dtype) * fill
        made[f"t{number}"] = distribute_tensor(whole, mesh, placements)
    return {**made, "plain": torch.arange(6.0) * fill, "number": torch.tensor(3.0 * fill)}


def moved(rank: int, before: str, then: str, scattered: bool) -> list[int]:
    """Of the whole tensors afterwards, how many elements are wrong; what one rank had lies at another one."""
    dist.init_process_group("gloo")
    reshard._PIECE_BYTES = 64
    link = PointToPoint()
    old = tensors(before, fill=True)
    offers = list(zip(decode(encode(parts_of(old))), map(local, old.values()), strict=True))
    if scattered:  # rank 3 has what 0 and 3 had, 0 and 1 have nothing
        everything: list[Any] = [None] * RANKS
        dist.all_gather_object(everything, offers)
        offers = {0: [], 1: [], 2: everything[1] + everything[2], 3: everything[0] + everything[3]}[rank]
    new = tensors(then, fill=False)
    Reshard(link, parts_of(new)).run({name: local(tensor) for name, tensor in new.items()}, offers)
    wrong, right = [], tensors("whole", fill=True)
    for name, tensor in new.items():
        whole = tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
        wrong.append(int((whole != local(right[name])).sum()))
    return wrong


@pytest.mark.parametrize("scattered", [False, True], ids=["in place", "elsewhere"])
@pytest.mark.parametrize(
    ("before", "then"),
    [("rows", "columns"), ("rows", "rows"), ("two copies", "both"), ("both", "two copies"), ("whole", "rows")],
)
def test_every_element_arrives(before: str, then: str, scattered: bool) -> None:
    assert run_ranks(moved, RANKS, before, then, scattered) == [[0] * (len(SHAPES) + 2)] * RANKS


def sent(rank: int) -> int:
    """Bytes that this rank sends for the same layout with what it needs at its place."""
    dist.init_process_group("gloo")
    link, count = PointToPoint(), 0
    exchange = link.exchange

    def counting(outgoing: Any, incoming: Any) -> None:
        nonlocal count
        count += sum(tensor.nbytes for _, tensor in outgoing)
        exchange(outgoing, incoming)

    link.exchange = counting  # type: ignore[method-assign]
    old, new = tensors("two copies", fill=True), tensors("two copies", fill=False)
    offers = list(zip(parts_of(old), map(local, old.values()), strict=True))
    Reshard(link, parts_of(new)).run({name: local(tensor) for name, tensor in new.items()}, offers)
    return count


def test_nobody_sends_what_is_there() -> None:
    assert run_ranks(sent, RANKS) == [0] * RANKS


def test_what_nobody_has_is_no_part() -> None:
    part = Part("w", torch.float32, (4,), (0,), (4,))
    with pytest.raises(AssertionError, match="w: 2 elements"):
        Reshard(PointToPoint(), [part]).run(
            {"w": torch.zeros(4)}, [(Part("w", torch.float32, (4,), (2,), (2,)), torch.zeros(2))]
        )


def between_engines(rank: int, before: list[str], then: list[str]) -> list[str]:
    """Names of tensors, weights and optimizer state, that are not the same bits afterwards."""
    old = start_engine(*before)
    train(old, 1)
    new = start_engine(*then)
    train(new, 2)
    offered, _ = flatten({"engine": old.state.state_dict()})
    needed, _ = flatten({"engine": new.state.state_dict()})
    offers = list(zip(parts_of(offered), [local(tensor).detach() for tensor in offered.values()], strict=True))
    targets = {name: local(tensor).detach() for name, tensor in needed.items()}
    Reshard(PointToPoint(), parts_of(needed)).run(targets, offers)
    return differing(snapshot(old), snapshot(new))


@pytest.mark.parametrize(
    ("before", "then"),
    [(["engine.mesh.tensor=2"], []), ([], ["engine.mesh.tensor=2"]), (["engine.mesh.replicate=2"], [])],
    ids=["tensor parallel", "to tensor parallel", "two copies"],
)
def test_an_engine_gets_the_bits_of_one_with_another_mesh(before: list[str], then: list[str]) -> None:
    assert run_ranks(between_engines, RANKS, before, then) == [[]] * RANKS
