"""Copies at partners: after the loss of a node the run goes on from the newest step that is whole somewhere."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch.distributed as dist

from areal_ray.checkpoint.memory import kept_images, partners, search
from areal_ray.distributed.point_to_point import PointToPoint
from areal_ray.processes.memory_keeper import kept_names
from tests.distributed.killed_run import Numbers
from tests.distributed.memory_attempts import INFO, LAST, LET_GO, die, let_go_and_die, to_be_killed
from tests.distributed.partner_attempts import Nodes, Owners, PartnerAttempt, after, leave
from tests.distributed.ranks import RankFailed, run_ranks

pytestmark = pytest.mark.distributed


def at_each_step(rank: int) -> list[str]:
    dist.init_process_group("gloo")
    numbers, bits = Numbers(), []
    for step in range(2 * LAST + 1):
        if step:
            numbers.train()
        bits.append(numbers.bits())
    return bits


@pytest.fixture(scope="module")
def bits() -> list[str]:
    """What there is to be after each step, whole: the same for any number of ranks."""
    return run_ranks(at_each_step, 1)[0]


@pytest.mark.parametrize(
    ("before", "lost", "then"),
    [
        ("ab", "b", "ac"),
        ("ab", "a", "cb"),
        ("ab", "b", "a"),
        ("ab", "a", "b"),
        ("ab", "b", "aac"),
        ("abc", "b", "ac"),
        ("abc", "b", "caca"),
        ("aab", "a", "b"),
        ("aab", "b", "aa"),
        ("ab", "", "ba"),
        ("aa", "", "a"),
    ],
    ids=lambda value: value or "none",
)
def test_after_the_loss_of_a_node_nothing_is_lost(
    name: str, nodes: Nodes, bits: list[str], before: str, lost: str, then: str
) -> None:
    leave(name, before, nodes.owners)
    nodes.lose(*lost)
    for found in run_ranks(after, len(then), name, then, nodes.owners):
        assert (found["step"], found["bits"], found["told"]) == (LAST, bits[LAST], LAST)
        assert found["copy"] == ((1, LAST), {"numbers": {"step": LAST}, "told": {"value": LAST}}, INFO)
    assert [found["copy"] for found in run_ranks(after, len(then), name, then, nodes.owners)] == [None] * len(then)
    assert kept_names(f"{name}-") == []


def goes_on(rank: int, name: str, nodes: str, owners: Owners, number: int) -> None:
    """Attempt `number`: restore, some steps more, killed."""
    attempt = PartnerAttempt(name, nodes, owners)
    attempt.restore(attempt=number - 1)
    for _ in range(2):
        attempt.numbers.train()
        attempt.told.value = attempt.numbers.step
        attempt.copies.save((number, attempt.numbers.step), attempt.state, INFO)
        attempt.settle()
    dist.barrier()
    if rank == len(nodes) - 1:
        die()
    to_be_killed()


def restored(rank: int, name: str, nodes: str, owners: Owners, number: int) -> tuple[int, str]:
    found = PartnerAttempt(name, nodes, owners).restore(attempt=number - 1)
    return found["step"], found["bits"]


def test_one_node_after_the_other_is_lost_and_comes_back(name: str, nodes: Nodes, bits: list[str]) -> None:
    leave(name, "ab", nodes.owners)
    nodes.lose("b")
    for number, (there, lost) in enumerate([("ac", "a"), ("cb", "c")], start=2):
        nodes.start(*set(there) - set(nodes.owners))
        with pytest.raises(RankFailed, match="rank 1 died"):
            run_ranks(goes_on, 2, name, there, nodes.owners, number)
        nodes.lose(lost)
    assert run_ranks(restored, 1, name, "b", nodes.owners, 4) == [(LAST + 4, bits[LAST + 4])]


def test_two_lost_neighbours_of_the_ring_are_too_many(name: str, nodes: Nodes) -> None:
    leave(name, "abc", nodes.owners)
    nodes.lose("b", "c")  # b's are at c
    (found,) = run_ranks(after, 1, name, "a", nodes.owners)
    assert (found["step"], found["copy"], found["said"][1:]) == (0, None, [])


@pytest.mark.parametrize(("not_durable", "step"), [((4,), 3), ((3,), 4), ((3, 4), 2)])
def test_what_does_not_count_on_one_rank_is_no_partners_either(
    name: str, nodes: Nodes, bits: list[str], not_durable: Sequence[int], step: int
) -> None:
    leave(name, "ab", nodes.owners, not_durable)
    nodes.lose("b")
    (found,) = run_ranks(after, 1, name, "a", nodes.owners)
    assert (found["step"], found["bits"]) == (step, bits[step])


def in_place(rank: int, name: str, nodes: str, owners: Owners) -> tuple[int, bool]:
    attempt, given = PartnerAttempt(name, nodes, owners), []
    newest = search.Search.newest

    def seen(self: search.Search, newer_than: Any) -> Any:
        given.append(newest(self, newer_than))
        return given[0]

    search.Search.newest = seen  # type: ignore[method-assign]
    return attempt.restore()["step"], given[0].in_place


def test_a_killed_worker_finds_its_own(name: str, nodes: Nodes) -> None:
    leave(name, "ab", nodes.owners)
    assert run_ranks(in_place, 2, name, "ab", nodes.owners) == [(LAST, True)] * 2


def dies_after(exchanges: int, link: PointToPoint) -> None:
    exchange, left = link.exchange, iter(range(exchanges))

    def cut(*messages: Any) -> None:
        if next(left, None) is None:
            die()
        exchange(*messages)

    link.exchange = cut  # type: ignore[method-assign]


def cut_off(rank: int, name: str, nodes: str, owners: Owners, pieces: int) -> None:
    """Rank 1 is killed when so many pieces of its last copy have been sent, and rank 0 waits for the next."""
    partners._PIECE_BYTES = 1000
    attempt = PartnerAttempt(name, nodes, owners)
    for step in range(1, LAST + 1):
        if rank == 1 and step == LAST:
            dies_after(pieces + 2, attempt.partners.link)  # two words come before
        attempt.step()
        if step < LAST:
            attempt.settle()
    to_be_killed()


@pytest.mark.parametrize("lost", ["a", "b", ""])
@pytest.mark.parametrize("pieces", [0, 5, 1])
def test_killed_while_it_sends(name: str, nodes: Nodes, bits: list[str], pieces: int, lost: str) -> None:
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(cut_off, 2, name, "ab", nodes.owners, pieces)
    nodes.lose(*lost)
    then = {"a": "cb", "b": "ac", "": "ab"}[lost]
    step = LAST - 1 if lost else LAST  # its own is whole
    for found in run_ranks(after, 2, name, then, nodes.owners):
        assert (found["step"], found["bits"]) == (step, bits[step])


def flipped(rank: int, name: str, nodes: str, owners: Owners, count: int) -> dict[str, Any]:
    """A bit of so many of the newest files is another one."""
    attempt, claim = PartnerAttempt(name, nodes, owners), kept_images.claim

    def step(file: int) -> int:
        found = kept_images.find_record(file)
        return found[1]["version"][1] if found else 0

    def damaged(name: str) -> list[int]:
        files = claim(name)
        newest = sorted(files, key=step, reverse=True)
        for file in newest[:count] if name.endswith("-partner") else ():
            os.pwrite(file, bytes([os.pread(file, 1, 1000)[0] ^ 1]), 1000)
        return files

    kept_images.claim = damaged
    return attempt.restore()


@pytest.mark.parametrize(("count", "step"), [(1, LAST - 1), (2, 0)])
def test_what_is_damaged_is_passed_over(name: str, nodes: Nodes, bits: list[str], count: int, step: int) -> None:
    leave(name, "ab", nodes.owners)
    nodes.lose("b")
    found = run_ranks(flipped, 2, name, "ac", nodes.owners, count)
    assert [(each["step"], each["bits"]) for each in found] == [(step, bits[step])] * 2
    (said,) = [line for line in found[0]["said"] if "passing over" in line]
    assert f"CheckpointDamaged: the copy in memory of step {LAST} does not match its checksum" in said


def test_a_damaged_partner_copy_is_of_no_matter_where_the_own_one_is(name: str, nodes: Nodes) -> None:
    leave(name, "ab", nodes.owners)
    assert [each["step"] for each in run_ranks(flipped, 2, name, "ab", nodes.owners, 2)] == [LAST] * 2


def slow(rank: int, name: str, nodes: str, owners: Owners) -> dict[str, Any]:
    """The second copy is on its way while two more are due."""
    attempt, go = PartnerAttempt(name, nodes, owners), threading.Event()
    send = attempt.partners.send

    def waiting(*arguments: Any) -> bool:
        go.wait()
        return send(*arguments)

    attempt.step()
    attempt.settle()
    if rank == 1:
        attempt.partners.send = waiting  # type: ignore[method-assign]
    for _ in range(3):
        attempt.step()
    dist.barrier()
    turn = attempt.copies._turn
    go.set()
    attempt.settle()
    attempt.step()
    attempt.settle()
    kept = next(iter(attempt.partners._guests.values()))
    records = [kept_images.find_record(file) for file in kept.files]
    return {
        "turn": turn,
        "steps": sorted(record[1]["version"][1] for record in records if record),
        "said": attempt.said,
    }


def test_what_is_due_while_one_is_on_its_way_is_left_out(name: str, nodes: Nodes) -> None:
    first, second = run_ranks(slow, 2, name, "ab", nodes.owners)
    assert (first["turn"], first["steps"]) == (second["turn"], second["steps"]) == (0, [2, 5])
    assert first["said"] == ["the copy in memory of step 3 is left out: the one before is on its way to the partners"]
    assert second["said"] == []


def forgets(rank: int, name: str, nodes: str, owners: Owners, ends: bool) -> None:
    attempt = PartnerAttempt(name, nodes, owners)
    for _ in range(2):
        attempt.step()
        attempt.settle()
    let_go_and_die(attempt, ends)


@pytest.mark.parametrize("ends", LET_GO.values(), ids=LET_GO)
def test_nothing_comes_back_when(name: str, nodes: Nodes, ends: bool) -> None:
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(forgets, 2, name, "ab", nodes.owners, ends)
    nodes.lose("b")
    (found,) = run_ranks(after, 1, name, "a", nodes.owners)
    assert found["copy"] is None
