"""Reading ahead: many requests under way, their answers in order, and never much more memory than is allowed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_IN_FLIGHT = 8
_BYTES = 128 << 20


def read_ahead(
    reads: Iterable[tuple[int, Callable[[], T]]], in_flight: int = _IN_FLIGHT, limit: int = _BYTES
) -> Generator[T]:
    """The results of reads, in their order, while those that come next are under way.

    Args:
        reads: bytes of the result, and what reads it, in a thread; asked for as there is room.
        in_flight: reads under way or waiting to be taken.
        limit: bytes of these together; one that is larger is read alone.

    Raises:
        Exception: of the first read that failed; what comes after it may have been read in vain.
    """
    waiting: deque[tuple[int, Future[T]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(in_flight, thread_name_prefix="read-ahead")
    try:
        for size, read in reads:
            while waiting and (len(waiting) == in_flight or held + size > limit):
                yield waiting[0][1].result()
                held -= waiting.popleft()[0]
            waiting.append((size, pool.submit(read)))
            held += size
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
