"""Preparing a large corpus on a machine that belongs to no cluster, with a process for each of its cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

from areal_ray.data.corpus.shard import Advance, Group, Record, Work, prepare_group

DEATHS = 3  # of processes, without a group that was finished between them, after which it is given up


def in_processes(work: Work, groups: Sequence[Group], advance: Advance) -> list[Record]:
    """Prepare the groups in processes of this machine; one that is killed costs the groups that were in work.

    Memory: that of `prepare_group`, for every core. What a source or a renderer raises is raised here, at once.

    Raises:
        OSError: if processes die again and again.
    """
    records: dict[int, Record] = {}
    deaths = 0
    while len(records) < len(groups):
        before = len(records)
        try:
            _round(work, [group for group in groups if group.number not in records], records, advance)
        except BrokenProcessPool:
            deaths = 1 if len(records) > before else deaths + 1
            if deaths == DEATHS:
                text = "processes that prepare data are killed again and again"
                raise OSError(f"{text}: is there too little memory? (data.prepare_in_process_mb)") from None
    return [records[group.number] for group in groups]


def _round(work: Work, groups: Sequence[Group], records: dict[int, Record], advance: Advance) -> None:
    """Prepare groups until all are done, or a process dies."""
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks in whatever state they are
    alive, held = context.Pipe(duplex=False)
    count = min(len(groups), len(os.sched_getaffinity(0)))
    pool = ProcessPoolExecutor(count, context, _begin, (alive,))
    try:
        futures = {pool.submit(prepare_group, work, group, True): group for group in groups}
        for future in as_completed(futures):
            group, record = futures.pop(future), future.result()
            records[group.number] = record
            advance(group.bytes, sum(shard.tokens for shard in record.shards.values()))
        pool.shutdown()
    finally:
        held.close()  # ends the processes, in the middle of their groups: an error, or Ctrl-C, does not wait for them
        alive.close()
        pool.shutdown(cancel_futures=True)


def _begin(alive: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent's to answer
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive: Connection) -> None:
    """End this process as soon as nobody holds the other end: the parent may be killed, too."""
    alive.poll(None)
    os._exit(1)
