"""Copies in memory: whenever a rank is killed, those who come after it have the same one, or none."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from areal_ray.checkpoint import MemoryCopies
from areal_ray.checkpoint.format.shard_file import ShardImage
from areal_ray.checkpoint.memory import kept_images
from tests.distributed.killed_run import Numbers
from tests.distributed.memory_attempts import INFO, LAST, Attempt, after, die, leave, to_be_killed
from tests.distributed.ranks import RankFailed, run_ranks

pytestmark = pytest.mark.distributed


def bits_at(step: int) -> str:
    """Of what is trained; a function of the step and the number of ranks. A collective."""
    numbers = Numbers()
    for _ in range(step):
        numbers.train()
    return numbers.bits()


def at_each_step(rank: int) -> list[str]:
    dist.init_process_group("gloo")
    return [bits_at(step) for step in range(LAST + 1)]


@pytest.fixture(scope="module")
def bits() -> list[str]:
    """What two ranks are to have after each step."""
    return run_ranks(at_each_step, 2)[0]


def wait_for_the_other() -> None:
    dist.recv(torch.zeros(1), 0)


def half_a_copy(image: ShardImage, tensors: list[torch.Tensor], whole: list[bool]) -> None:
    for kept, tensor in list(zip(image.tensors, tensors, strict=True))[:3]:
        kept.copy_(tensor)
    wait_for_the_other()
    die()


def no_record(*_: Any) -> None:
    wait_for_the_other()
    die()


def half_a_record(file: int, data: bytes, at: int) -> None:
    os.write_at(file, data[: len(data) // 2], at)  # type: ignore[attr-defined]
    wait_for_the_other()
    die()


def whole_record(file: int, data: bytes, at: int) -> None:
    os.write_at(file, data, at)  # type: ignore[attr-defined]
    wait_for_the_other()
    die()


CUTS: dict[str, tuple[Any, str, Any]] = {
    "half of the tensors": (ShardImage, "fill", half_a_copy),
    "no record": (MemoryCopies, "_seal", no_record),
    "half a record": (os, "pwrite", half_a_record),
    "a whole record": (os, "pwrite", whole_record),
}


def cut_off(rank: int, name: str, parent: int, cut: str) -> None:
    """Rank 1 is killed at that point of its last copy, when rank 0 has its own whole."""
    attempt = Attempt(name, parent)
    for step in range(1, LAST + 1):
        if rank == 1 and step == LAST:
            attempt.copies._last.result()  # type: ignore[union-attr]
            where, what, instead = CUTS[cut]
            os.write_at = os.pwrite  # type: ignore[attr-defined]
            setattr(where, what, instead)
        attempt.step()
    attempt.copies._last.result()  # type: ignore[union-attr]
    if rank == 0:
        dist.send(torch.zeros(1), 1)
    to_be_killed()


@pytest.mark.parametrize("cut", CUTS)
def test_whenever_a_rank_is_killed_all_go_on_from_the_same_copy(name: str, bits: list[str], cut: str) -> None:
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(cut_off, 2, name, os.getpid(), cut)
    step = LAST if cut == "a whole record" else LAST - 1
    for found in run_ranks(after, 2, name, os.getpid()):
        assert (found["step"], found["bits"], found["told"], found["said"]) == (step, bits[step], step, [])
        assert found["copy"] == ((1, step), {"numbers": {"step": step}, "told": {"value": step}}, INFO)


@pytest.mark.parametrize(("not_durable", "step"), [((4,), 3), ((3,), 4), ((3, 4), 2), ((2, 4), 3)])
def test_a_copy_that_does_not_count_on_one_rank_costs_no_other_one(
    name: str, bits: list[str], not_durable: Any, step: int
) -> None:
    leave(name, *not_durable)
    found = run_ranks(after, 2, name, os.getpid())
    assert [(each["step"], each["bits"]) for each in found] == [(step, bits[step])] * 2


def test_a_copy_comes_back_once(name: str) -> None:
    leave(name)
    assert [found["step"] for found in run_ranks(after, 2, name, os.getpid())] == [LAST] * 2
    assert [(found["step"], found["copy"]) for found in run_ranks(after, 2, name, os.getpid())] == [(0, None)] * 2


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ((INFO, (1, LAST - 1)), True),
        ((INFO, (1, LAST)), False),
        ((INFO, (2, 1)), False),
        (({"config": {"lr": 0.2}},), False),
        ((INFO, None, 2), False),
    ],
    ids=["newer than the checkpoint", "of the same step", "older", "of another configuration", "of an earlier attempt"],
)
def test_only_what_is_newer_and_of_the_same_run_is_used(name: str, options: Any, used: bool) -> None:
    leave(name)
    for found in run_ranks(after, 2, name, os.getpid(), *options):
        assert (found["step"], found["told"], found["said"]) == ((LAST, LAST, []) if used else (0, 0, []))


def test_another_number_of_ranks_goes_without(name: str) -> None:
    leave(name)
    (found,) = run_ranks(after, 1, name, os.getpid())
    assert (found["step"], found["copy"], found["said"]) == (0, None, [])


def flipped(rank: int, name: str, parent: int) -> dict[str, Any]:
    """A bit of rank 1's newest copy is another one."""
    attempt = Attempt(name, parent)
    claim = kept_images.claim

    def damaged(name: str) -> list[int]:
        files = claim(name)
        for file in files if rank == 1 else ():
            byte = os.pread(file, 1, 1000)
            os.pwrite(file, bytes([byte[0] ^ 1]), 1000)
        return files

    kept_images.claim = damaged
    return attempt.restore()


def test_damage_on_one_rank_is_found_by_all(name: str) -> None:
    leave(name)
    found = run_ranks(flipped, 2, name, os.getpid())
    assert [(each["step"], each["told"], each["copy"]) for each in found] == [(0, 0, None)] * 2
    (said,) = found[0]["said"]
    assert "rank 1: CheckpointDamaged: the copy in memory of step 4 does not match its checksum" in said
    assert found[1]["said"] == []
