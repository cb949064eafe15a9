"""Copies at a partner: each rank's copy goes on to a rank of another node, so that it outlives its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from areal_ray.checkpoint.format.shard_file import ShardImage
from areal_ray.checkpoint.memory.kept_images import ClaimedFiles, GuestFiles
from areal_ray.distributed import Ranks
from areal_ray.distributed.point_to_point import Message, PointToPoint
from areal_ray.processes.memory_keeper import kept_names

_CLAIM_S = 30.0
_PIECE_BYTES = 4 << 20  # at most so much is on its way at a time, between steps that send, too


@dataclass(frozen=True)
class Place:
    """One rank among all.

    Args:
        partner: the rank that keeps its copies; None if all ranks are on one node.
        guests: the ranks whose copies it keeps.
        neighbours: the ranks of its node, itself among them.
    """

    partner: int | None
    guests: tuple[int, ...]
    neighbours: tuple[int, ...]


def places(nodes: Sequence[str]) -> list[Place]:
    """The place of each rank: its partner is the rank with the same number within the next node, in a ring of nodes.

    Where the next node has fewer ranks it is gone round again: some of them have several guests.

    Args:
        nodes: of each rank.
    """
    ranks_of = {node: [rank for rank, each in enumerate(nodes) if each == node] for node in dict.fromkeys(nodes)}
    ring = list(ranks_of)
    next_of = dict(zip(ring, [*ring[1:], *ring[:1]], strict=True))
    partners: list[int | None] = [None] * len(nodes)
    guests: list[list[int]] = [[] for _ in nodes]
    for node, ranks in ranks_of.items() if len(ring) > 1 else ():
        there = ranks_of[next_of[node]]
        for i, rank in enumerate(ranks):
            partners[rank] = partner = there[i % len(there)]
            guests[partner].append(rank)
    return [Place(partners[rank], tuple(guests[rank]), tuple(ranks_of[node])) for rank, node in enumerate(nodes)]


class Partners:
    """The other end of a rank's copies, and the copies that it keeps for others. Made by all ranks together.

    Bytes for each rank: those of its copy, out and in; three small messages. Memory: twice the copies of its guests,
    which with as many ranks on each node are as large as its own.

    Args:
        name: unique to this submission of the run.
        ranks: all ranks of the job.
        link: all ranks, over a process group of its own: what a thread sends must not mix with the training's.
        node: on which this rank runs.
        owner: process id of the node's own process, with which the memory goes; None: it stays without one.
        complain: prints a line for the user.
    """

    def __init__(
        self,
        name: str,
        ranks: Ranks,
        link: PointToPoint,
        node: str,
        owner: int | None,
        complain: Callable[[str], None],
    ) -> None:
        self._name, self._ranks, self.link, self._owner = name, ranks, link, owner
        nodes = ranks.gather_to_rank_zero(node)
        self._place = ranks.scatter(None if nodes is None else places(nodes))
        self._sizes: dict[int, int] = {}
        self._guests: dict[int, GuestFiles] = {}
        if not self.active and ranks.rank == 0:
            complain("copies in memory have no partner: all ranks are on one node (checkpoint.memory_partner)")

    @property
    def active(self) -> bool:
        """Whether there are partners: more nodes than one, the same on all ranks."""
        return self._place.partner is not None

    def claim(self, claimed: ClaimedFiles) -> None:
        """Take over what the attempt before has left on this node, whoever made it. A collective.

        Each rank takes what stands under its own number first, and then its share of the rest: each can be taken once.
        """
        own, neighbours = f"{self._name}-{self._ranks.rank}", self._place.neighbours
        theirs = {f"{self._name}-{rank}" for rank in neighbours}
        rest = [name for name in kept_names(f"{self._name}-") if name not in theirs]
        self._ranks.all_reduce_min(True)  # all have the same list
        claimed.claim(own)
        self._ranks.all_reduce_min(True)  # where two nodes are one machine, nobody takes another one's own
        until = time.monotonic() + _CLAIM_S  # there may be thousands of names that others have made up
        for name in rest[neighbours.index(self._ranks.rank) :: len(neighbours)]:
            if time.monotonic() < until:
                claimed.claim(name)

    def meet(self, size: int) -> list[int]:
        """Tell the partner how large a copy is; sizes of the files that are needed for guests. A collective."""
        told = {guest: torch.zeros(1, dtype=torch.int64) for guest in self._place.guests}
        self.link.exchange(self._to_partner(torch.tensor([size])), list(told.items()))
        self._sizes = {guest: int(number) for guest, number in told.items()}
        return [size for size in self._sizes.values() for _ in range(2)]

    def send(self, image: ShardImage, turn: int, counts: Future[bool], claimed: ClaimedFiles) -> bool:
        """Send a copy to the partner, and take in those of the guests. A collective, in a thread.

        Args:
            image: not changed before this has returned.
            turn: which of the two files it goes to: on all ranks the same.
            counts: whether the copy does (it is over by now); otherwise nothing is sent.
            claimed: memory to be used for guests.

        Returns:
            Whether these copies are whole, the own one at the partner and the guests' here.

        Raises:
            OSError: if there is no memory for guests; they hear of it, and the rest is done.
        """
        problem: OSError | None = None
        try:
            self._lay_out(claimed)
        except OSError as error:
            problem = error
        ready = torch.zeros(1, dtype=torch.int64)
        welcome = torch.tensor([problem is None], dtype=torch.int64)
        self.link.exchange([(guest, welcome) for guest in self._place.guests], self._to_partner(ready))
        record = os.pread(image.fd, os.fstat(image.fd).st_size, image.size) if counts.result() and ready else b""
        lengths = {guest: torch.zeros(1, dtype=torch.int64) for guest in self._place.guests}
        self.link.exchange(self._to_partner(torch.tensor([len(record)])), list(lengths.items()))
        records = {guest: torch.empty(int(length), dtype=torch.uint8) for guest, length in lengths.items() if length}
        for guest in records:
            os.ftruncate(self._guests[guest].files[turn], self._guests[guest].size)  # without its record
        out: list[torch.Tensor] = []
        if record:
            out = [*image.as_bytes().split(_PIECE_BYTES), torch.frombuffer(bytearray(record), dtype=torch.uint8)]
        into = [
            [(guest, piece) for piece in (*self._guests[guest].memory[turn].split(_PIECE_BYTES), buffer)]
            for guest, buffer in records.items()
        ]
        self._stream(out, into)
        for guest, buffer in records.items():
            kept = self._guests[guest]
            os.pwrite(kept.files[turn], buffer.numpy().tobytes(), kept.size)
        if problem is not None:
            raise problem
        return bool(record) and len(records) == len(self._place.guests)

    def erase(self) -> None:
        """Cut off the records that make copies of what is kept for guests."""
        for kept in self._guests.values():
            kept.erase()

    def release(self) -> None:
        """Let what is kept for guests go."""
        for kept in self._guests.values():
            kept.release()
        self._guests = {}

    def _lay_out(self, claimed: ClaimedFiles) -> None:
        if self._guests or not self._sizes:
            return
        try:
            for guest, size in self._sizes.items():
                name = f"{self._name}-{guest}-partner"
                claimed.claim(name)  # its memory, if it is there still, is used again
                self._guests[guest] = GuestFiles(name, self._owner, claimed, size)
        except OSError:
            self.release()
            raise
        finally:
            claimed.close()

    def _to_partner(self, tensor: torch.Tensor) -> list[Message]:
        return [] if self._place.partner is None else [(self._place.partner, tensor)]

    def _stream(self, out: Sequence[torch.Tensor], into: Sequence[Sequence[Message]]) -> None:
        """Piece by piece, each of the own copy with one of every guest's: no rank waits for one that waits for it."""
        for at in range(max(len(each) for each in (out, *into))):
            self.link.exchange(
                self._to_partner(out[at]) if at < len(out) else [], [pieces[at] for pieces in into if at < len(pieces)]
            )
