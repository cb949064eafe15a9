"""Messages between single ranks: what one needs goes to it alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

Message = tuple[int, torch.Tensor]  # the other rank; bytes that are sent, or the place of those that come


class PointToPoint:
    """Messages over a process group, for one thread at a time; in a single process there is nobody to send to.

    With N ranks `exchange` costs its own bytes, `all_to_all` in addition one small message to each of the N.

    Args:
        group: a group with a CPU backend; None means the default group, or a single process if there is none.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        alone = not dist.is_initialized()
        self.rank = 0 if alone else dist.get_rank(group)
        self.size = 1 if alone else dist.get_world_size(group)

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message]) -> None:
        """Send and receive at once; returns when all of it is done. The ranks at the other ends do their part."""
        works = [dist.irecv(tensor, group=self._group, group_src=rank) for rank, tensor in incoming]
        works += [dist.isend(tensor, group=self._group, group_dst=rank) for rank, tensor in outgoing]
        for work in works:
            assert work is not None  # this rank is in the group
            work.wait()

    def all_to_all(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Send each rank its rows of numbers (int64, two dimensions, everywhere as wide); those that came, by rank. A
        collective."""
        if self.size == 1:
            return list(rows)
        counts = torch.tensor([len(each) for each in rows])
        coming = torch.empty_like(counts)
        dist.all_to_all_single(coming, counts, group=self._group)
        out, into = torch.cat(list(rows)), torch.empty(int(coming.sum()), rows[0].shape[1], dtype=torch.int64)
        dist.all_to_all_single(into, out, coming.tolist(), counts.tolist(), group=self._group)
        return list(into.split(coming.tolist()))
