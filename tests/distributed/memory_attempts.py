"""Ranks whose state is copied to memory, killed and followed by others: what the tests of copies in memory share."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from areal_ray.checkpoint import MemoryCopies
from areal_ray.distributed import Ranks
from tests.distributed.killed_run import Numbers
from tests.distributed.ranks import RankFailed, run_ranks

INFO = {"config": {"lr": 0.1}}
LAST = 4  # step whose copy is cut off


class Told:
    """A count that only rank 0 has right, as some of what is saved."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Attempt:
    """The ranks of one start, in each of them what is trained and its copies."""

    def __init__(self, name: str, parent: int, durable: Callable[[], None] = lambda: None, **options: Any) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        self.ranks, self.numbers, self.told, self.said = Ranks(), Numbers(), Told(), []
        self.copies = MemoryCopies(name, self.ranks, parent, self.said.append, durable, **options)

    @property
    def state(self) -> dict[str, Any]:
        return {"numbers": self.numbers, "told": self.told}

    def step(self) -> None:
        self.numbers.train()
        self.told.value = self.numbers.step if self.ranks.rank == 0 else -1
        self.copies.save((1, self.numbers.step), self.state, INFO)

    def restore(
        self, info: dict[str, Any] = INFO, newer_than: tuple[int, int] | None = None, attempt: int = 1
    ) -> dict[str, Any]:
        copy = self.copies.restore(self.state, info, attempt, newer_than)
        found = {"step": self.numbers.step, "bits": self.numbers.bits(), "told": self.told.value, "said": self.said}
        return {**found, "copy": copy and (copy.version, copy.values, copy.info)}


def after(rank: int, name: str, parent: int, *options: Any) -> dict[str, Any]:
    return Attempt(name, parent).restore(*options)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def to_be_killed() -> None:
    threading.Event().wait()


LET_GO = {"state went back": False, "run came to its end": True}


def let_go_and_die(attempt: Attempt, ends: bool) -> None:
    """Make the copies useless, and then be killed."""
    if ends:
        attempt.copies.close()
    else:
        attempt.copies.forget()
    dist.barrier()
    if attempt.ranks.rank == 1:
        die()
    to_be_killed()


def killed(rank: int, name: str, parent: int, *not_durable: int) -> None:
    """All steps are copied, but for what is said of some on rank 1; then the ranks are killed."""
    steps = iter(range(1, LAST + 1))

    def durable() -> None:
        if next(steps) in not_durable and rank == 1:
            raise OSError("the disk is full")

    attempt = Attempt(name, parent, durable)
    for _ in range(LAST):
        attempt.step()
    attempt.copies._last.result()  # type: ignore[union-attr]
    dist.barrier()
    if rank == 1:
        die()
    to_be_killed()


def leave(name: str, *not_durable: int, ranks: int = 2) -> None:
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(killed, ranks, name, os.getpid(), *not_durable)
