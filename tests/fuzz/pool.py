"""Processes that run cases one after the other, forked from one that has imported everything."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from tests.fuzz.verdicts import CRASH, HANG, Verdict

LIMIT_S = 30.0  # for a case, of milliseconds: on a machine that is busy with other things, too
_MEMORY_BYTES = 2 << 30  # that a case may take beyond what is imported


@dataclass
class _Worker:
    """A child and what it is at.

    Args:
        pid: of the child.
        results: from the child: the number of a case that begins, or (number, kind, verdict) of one that has ended.
        left: cases that it has been given and not begun.
        current: the case that it has begun.
        since: when, on the monotonic clock.
    """

    pid: int
    results: Connection
    left: list[int]
    current: int | None
    since: float


def run_cases(
    numbers: Sequence[int], case: Callable[[int], tuple[str, Verdict]], processes: int
) -> Iterator[tuple[int, str, Verdict]]:
    """(number, kind, verdict) of each case as it ends; one that hangs or kills its process ends alone.

    Args:
        numbers: of the cases.
        case: runs one.
        processes: at a time.
    """
    shares = [list(numbers[i::processes]) for i in range(processes)]
    workers = [_start(share, case) for share in shares if share]
    try:
        while workers:
            ready = wait([worker.results for worker in workers], timeout=0.5)
            for worker in list(workers):
                late = time.monotonic() - worker.since > LIMIT_S
                if worker.results not in ready and not late:
                    continue
                message = None if worker.results not in ready else _receive(worker.results)
                if isinstance(message, int):
                    worker.current, worker.since = message, time.monotonic()
                    worker.left.remove(message)
                elif message is not None:
                    worker.current, worker.since = None, time.monotonic()
                    yield message
                else:
                    workers.remove(worker)
                    status = _end(worker)
                    if worker.current is not None:
                        verdict = (
                            Verdict(HANG, f"more than {LIMIT_S} s") if late else Verdict(CRASH, f"status {status}")
                        )
                        yield worker.current, "", verdict
                    if worker.left:
                        workers.append(_start(worker.left, case))
    finally:
        for worker in workers:
            _end(worker)


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError:  # it has ended, well or not
        return None


def _start(numbers: list[int], case: Callable[[int], tuple[str, Verdict]]) -> _Worker:
    mine, its = Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            mine.close()
            _limit()
            for number in numbers:
                its.send(number)
                its.send((number, *case(number)))
        finally:
            os._exit(0)
    its.close()
    return _Worker(pid, mine, list(numbers), None, time.monotonic())


def _limit() -> None:
    """Bound memory, and send what libraries print nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end(worker: _Worker) -> int:
    """The exit status, as os.waitstatus_to_exitcode says it."""
    worker.results.close()
    os.kill(worker.pid, signal.SIGKILL)  # of one that has ended nothing is left to be killed
    return os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
