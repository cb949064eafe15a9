"""Preparing a large corpus on a machine that belongs to no cluster, with a process for each of its cores."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection

from areal_ray.config import ConfigError
from areal_ray.data.corpus.shard import Advance, Group, Record, Work, prepare_group

_ENOUGH = 3  # breaks of the pool, without a group that was finished between them, after which it is given up
# Threads of libraries: one a process, as there is a process for each core.
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class InProcesses:
    """Prepares groups in processes of this machine; one that is killed costs the groups that were in work.

    After that half as many processes go on: memory is what they are mostly killed for. A process takes that of
    `prepare_group`, and some hundred megabytes of libraries, most of it shared.

    Args:
        say: prints a line for the user.
        most: processes; None: one for each core.
    """

    def __init__(self, say: Callable[[str], None], most: int | None = None) -> None:
        self._say, self._count = say, most or len(os.sched_getaffinity(0))

    def __call__(self, work: Work, groups: Sequence[Group], advance: Advance) -> list[Record]:
        """Prepare the groups. What a source or a renderer raises is raised here, at once.

        Raises:
            ConfigError: if processes die again and again.
        """
        records: dict[int, Record] = {}
        breaks = 0
        while len(records) < len(groups):
            before = len(records)
            try:
                self._prepare([group for group in groups if group.number not in records], work, records, advance)
            except BrokenProcessPool as error:
                if error.__cause__ is not None:  # something that could not be sent, and not a death
                    raise
                breaks = 1 if len(records) > before else breaks + 1
                if breaks == _ENOUGH:
                    text = "prepare it in one process, with a larger value"
                    raise ConfigError("data.prepare_in_process_mb", f"processes die again and again: {text}") from None
                self._count = max(1, self._count // 2)
                self._say(f"a process that prepares data was killed (no memory?): going on with {self._count}")
        return [records[group.number] for group in groups]

    def _prepare(self, groups: Sequence[Group], work: Work, records: dict[int, Record], advance: Advance) -> None:
        """Prepare groups until all are done, or a process dies."""
        context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks in whatever state they are
        alive, held = context.Pipe(duplex=False)
        pool = ProcessPoolExecutor(min(len(groups), self._count), context, _begin, (alive, work))
        try:
            with _for_children():
                futures = {pool.submit(_prepare, group): group for group in groups}
            for future in as_completed(futures):
                group, record = futures.pop(future), future.result()
                records[group.number] = record
                advance(group.bytes, sum(shard.tokens for shard in record.shards.values()))
            pool.shutdown()
        finally:
            held.close()  # ends the processes in the middle of their groups: neither an error nor Ctrl-C waits for them
            alive.close()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _for_children() -> Iterator[None]:
    """What processes that are started meanwhile inherit: one thread, and no ear for the terminal's Ctrl-C."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.update(_ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Process:
    """A process of the pool: sent once what every group needs, which may be the whole of a tokenizer."""

    work: Work


def _begin(alive: Connection, work: Work) -> None:
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    _Process.work = work


def _end_with(alive: Connection) -> None:
    """End this process as soon as nobody holds the other end: the parent may be killed, too."""
    alive.poll(None)
    os._exit(1)


def _prepare(group: Group) -> Record:
    try:
        return prepare_group(_Process.work, group, keep=True)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301  (its own)
        except Exception:  # noqa: BLE001  (whatever its class does)
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise
