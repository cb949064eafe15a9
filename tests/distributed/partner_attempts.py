"""Ranks on made-up nodes whose copies go to partners: what the tests of lost nodes share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

from areal_ray.checkpoint import MemoryCopies, Partners
from areal_ray.distributed.point_to_point import PointToPoint
from areal_ray.processes.memory_keeper import claim, kept_names
from tests.distributed.memory_attempts import LAST, Attempt, die, to_be_killed
from tests.distributed.ranks import RankFailed, run_ranks

Owners = Mapping[str, int]  # process ids by node


class PartnerAttempt(Attempt):
    """The ranks of one start; `nodes` says where each of them runs."""

    def __init__(
        self,
        name: str,
        nodes: Sequence[str],
        owners: Owners,
        durable: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        super().__init__(name, os.getpid())
        node, link = nodes[self.ranks.rank], PointToPoint(dist.new_group(backend="gloo"))
        owner = owners[node]
        self.partners = Partners(name, self.ranks, link, node, owner, self.said.append)
        options["partners"] = self.partners
        self.copies = MemoryCopies(name, self.ranks, owner, self.said.append, durable, **options)

    def settle(self) -> None:
        """Wait until the last copy is at the partners."""
        self.copies._last.result()  # type: ignore[union-attr]
        if self.copies._sent is not None:
            self.copies._sent.result()


class Nodes:
    """Made-up nodes: a process for each, with which the memory of its ranks goes."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def owners(self) -> dict[str, int]:
        return {node: process.pid for node, process in self._processes.items()}

    def start(self, *nodes: str) -> None:
        for node in nodes:
            self._processes[node] = subprocess.Popen(["cat"], stdin=subprocess.PIPE)

    def lose(self, *nodes: str) -> None:
        """As a power cut: what its ranks have kept is gone."""
        for node in nodes:
            process = self._processes.pop(node)
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


@contextmanager
def made_up(name: str) -> Iterator[Nodes]:
    """Nodes, all of them ended afterwards, and what ranks have left there let go."""
    nodes = Nodes()
    nodes.start("a", "b", "c")
    try:
        yield nodes
    finally:
        nodes.lose(*nodes.owners)
        for left in kept_names(f"{name}-"):
            for file in claim(left):
                os.close(file)


def killed(rank: int, name: str, nodes: Sequence[str], owners: Owners, not_durable: Sequence[int]) -> None:
    """All steps are copied and sent, but for what rank 0 says of some; then the ranks are killed."""
    steps = iter(range(1, LAST + 1))

    def durable() -> None:
        if next(steps) in not_durable and rank == 0:
            raise OSError("the disk is full")

    attempt = PartnerAttempt(name, nodes, owners, durable)
    for _ in range(LAST):
        attempt.step()
        attempt.settle()
    dist.barrier()
    if rank == len(nodes) - 1:
        die()
    to_be_killed()


def leave(name: str, nodes: Sequence[str], owners: Owners, not_durable: Sequence[int] = ()) -> None:
    with pytest.raises(RankFailed, match=f"rank {len(nodes) - 1} died"):
        run_ranks(killed, len(nodes), name, nodes, owners, not_durable)


def after(rank: int, name: str, nodes: Sequence[str], owners: Owners) -> dict[str, Any]:
    return PartnerAttempt(name, nodes, owners).restore()
