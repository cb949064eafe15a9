"""The ranks of a job as seen by bookkeeping: small objects agreed upon, work done together or failed together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


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
    """A process group for objects. All methods are collectives; in a single process they are trivial.

    Args:
        group: a group with a CPU backend; None means the default group, or a single process if there is none.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._alone = not dist.is_initialized()
        self.rank = 0 if self._alone else dist.get_rank(group)
        self.size = 1 if self._alone else dist.get_world_size(group)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on every rank."""
        if self._alone:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

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

    def agree(self, opinion: bool) -> bool:
        """The opinion of rank 0, on every rank."""
        return self.broadcast(opinion)

    def all_or_raise(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank; every rank's result on every rank, or RankError on all of them.

        A rank that raised alone would leave the others in their next collective until it times out.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:  # noqa: BLE001  (raised again below, on every rank)
            error = caught
        failure = (
            None if error is None else (f"{type(error).__name__}: {error}", [c.__name__ for c in type(error).__mro__])
        )
        outcomes = self.gather((result, failure))
        failures = [(rank, *failure) for rank, (_, failure) in enumerate(outcomes) if failure is not None]
        if failures:
            raise RankError(failures) from error
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 only; its result, or its failure as RankError, on every rank."""
        return self.all_or_raise(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]
