"""The ranks of a job as seen by bookkeeping: small objects agreed upon, work done together or failed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_Failure = tuple[str, list[str]]  # text, names of the exception's class and its bases


class RankError(RuntimeError):
    """Some ranks failed at work that all of them must finish; raised on every rank, with what happened where.

    Args:
        failures: (rank, text, names of the exception's class and its bases) of each rank that failed.
    """

    def __init__(self, failures: list[tuple[int, str, list[str]]]) -> None:
        self.failures = failures
        super().__init__("; ".join(f"rank {rank}: {text}" for rank, text, _ in failures))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failures,), self.__dict__

    def only(self, kind: type[Exception]) -> bool:
        """Whether nothing but exceptions of this kind happened."""
        return all(kind.__name__ in names for _, _, names in self.failures)


class Ranks:
    """A process group for small objects. All methods are collectives; in a single process they are trivial.

    What they cost with N ranks: outcomes and numbers are one word each; an object that one rank knows is sent to the
    others once (`broadcast`, `on_rank_zero`), or collected by one of them (`gather_to_rank_zero`). Only `gather` grows
    with N on every rank.

    Args:
        group: a group with a CPU backend; None means the default group, or a single process if there is none.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._alone = not dist.is_initialized() or dist.get_world_size(group) == 1
        self.rank = 0 if self._alone else dist.get_rank(group)
        self.size = 1 if self._alone else dist.get_world_size(group)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on every rank: N objects there, each padded to the largest."""
        if self._alone:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def gather_to_rank_zero(self, value: T) -> list[T] | None:
        """Every rank's value, in the order of the ranks, on rank 0; None elsewhere."""
        if self._alone:
            return [value]
        values: list[T | None] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, group=self._group, group_dst=0)
        return values  # type: ignore[return-value]

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]] | None:
        """Every rank's numbers, in the order of the ranks, on rank 0; None elsewhere, where nobody is waited for.

        As many on each rank: one message of 8 bytes a number from each of them, cheap enough for every line of metrics.
        """
        if self._alone:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(own, found, group=self._group, group_dst=0)
        return None if found is None else [each.tolist() for each in found]

    def scatter(self, values: Sequence[T] | None) -> T:
        """This rank's value of those that rank 0 has for all, in the order of the ranks; None elsewhere."""
        if self._alone:
            assert values is not None
            return values[0]
        box: list[Any] = [None]
        dist.scatter_object_list(box, None if values is None else list(values), group=self._group, group_src=0)
        return box[0]

    def broadcast(self, value: T) -> T:
        """The value of rank 0, on every rank."""
        if self._alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    def broadcast_int(self, value: int) -> int:
        """The number of rank 0, on every rank: cheap enough for every step."""
        if self._alone:
            return value
        box = torch.tensor([value])
        dist.broadcast(box, group=self._group, group_src=0)
        return int(box)

    def all_reduce_min(self, value: int) -> int:
        """The lowest of all ranks' numbers, on every rank; nobody has it before all have said theirs."""
        if self._alone:
            return value
        box = torch.tensor([value])
        dist.all_reduce(box, dist.ReduceOp.MIN, group=self._group)
        return int(box)

    def all_reduce_sum(self, value: int) -> int:
        """The sum of all ranks' signed 64-bit numbers, on every rank; beyond 64 bits it begins anew."""
        if self._alone:
            return value
        box = torch.tensor([value])
        dist.all_reduce(box, dist.ReduceOp.SUM, group=self._group)
        return int(box)

    def agree(self, opinion: bool) -> bool:
        """The opinion of rank 0, on every rank."""
        return bool(self.broadcast_int(opinion))

    def all_or_raise(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; this rank's result, or RankError on all of them.

        A rank that raised alone would leave the others in their next collective until it times out. What went wrong is
        sent only if something did.
        """
        result, error, failure = _attempt(work)
        if not self.all_reduce_min(failure is None):
            told = self.gather(failure)
            raise RankError([(rank, *each) for rank, each in enumerate(told) if each is not None]) from error
        return result  # type: ignore[return-value]

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 only; its result, or its failure as RankError, on every rank.

        Rank 0 does not wait for the others.
        """
        result, error, failure = _attempt(work) if self.rank == 0 else (None, None, None)
        result, failure = self.broadcast((result, failure))
        if failure is not None:
            raise RankError([(0, *failure)]) from error
        return result  # type: ignore[return-value]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None, _Failure | None]:
    """Result of `work`, or its exception and what to tell of it."""
    try:
        return work(), None, None
    except Exception as error:  # noqa: BLE001  (raised again, on every rank)
        return None, error, (f"{type(error).__name__}: {error}", [each.__name__ for each in type(error).__mro__])
