"""Memory for copies of other ranks: where there are none, where there is no room, and whose it was before."""

from __future__ import annotations

import os
from typing import Any

import pytest

from areal_ray.checkpoint.memory import partners
from tests.distributed.memory_attempts import LAST
from tests.distributed.partner_attempts import Nodes, Owners, PartnerAttempt, after, leave
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


def on_one_node(rank: int, name: str, owners: Owners) -> list[str]:
    attempt = PartnerAttempt(name, "aa", owners)
    for _ in range(3):
        attempt.step()
    assert attempt.copies._sent is None
    return attempt.said


def test_on_one_node_there_is_no_partner(name: str, nodes: Nodes) -> None:
    first, second = run_ranks(on_one_node, 2, name, nodes.owners)
    assert first == ["copies in memory have no partner: all ranks are on one node (checkpoint.memory_partner)"]
    assert second == []


def without_room(rank: int, name: str, nodes: str, owners: Owners) -> tuple[list[str], list[int]]:
    """Rank 1 has no memory for its guest at the first copy."""
    attempt, guest_files = PartnerAttempt(name, nodes, owners, retry_after=1), partners.GuestFiles

    def none(*_: Any) -> None:
        raise OSError("too many open files")

    if rank == 1:
        partners.GuestFiles = none  # type: ignore[assignment,misc]
    counts = []
    for step in range(1, 6):
        if step == 3:
            partners.GuestFiles = guest_files  # type: ignore[misc]
        attempt.step()
        for future in (attempt.copies._last, attempt.copies._sent):
            if future is not None:
                future.exception()
        counts.append(len(attempt.copies._kept.images))
    return attempt.said, counts


def test_without_room_for_guests_there_are_no_copies_for_a_while(name: str, nodes: Nodes) -> None:
    (quiet, counts), (said, also) = run_ranks(without_room, 2, name, "ab", nodes.owners)
    assert counts == also == [2, 0, 0, 2, 2]
    assert (quiet, said) == ([], ["no copies in memory for now: too many open files"])
    assert [each["step"] for each in run_ranks(after, 2, name, "ab", nodes.owners)] == [5] * 2


def again(rank: int, name: str, nodes: str, owners: Owners) -> tuple[int, set[int], set[int]]:
    attempt = PartnerAttempt(name, nodes, owners)
    step = attempt.restore()["step"]
    claimed = {os.fstat(file).st_ino for file in attempt.copies._claimed.files}
    attempt.step()
    attempt.settle()
    kept = next(iter(attempt.partners._guests.values()))
    files = [*kept.files, *(image.fd for image in attempt.copies._kept.images)]
    return step, claimed, {os.fstat(file).st_ino for file in files}


def test_the_memory_of_the_attempt_before_is_used_again(name: str, nodes: Nodes) -> None:
    leave(name, "ab", nodes.owners)
    for step, claimed, used in run_ranks(again, 2, name, "ab", nodes.owners):
        assert step == LAST
        assert len(claimed) >= 2  # its own; these nodes are one machine, and both look for the rest
        assert len(claimed & used) == min(len(claimed), len(used))
