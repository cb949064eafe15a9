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


class ProcessPool:
    """Pool of processes of this machine that prepare groups; one that is killed costs the groups that were in work.

    After that half as many go on: memory is what they are mostly killed for. Each takes that of `prepare_group`, and of
    the libraries that sources and tokenizer need.

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
        pool = ProcessPoolExecutor(min(len(groups), self._count), context, _begin, (alive,))
        shared = os.memfd_create("work")  # as a file, but gone with this process
        try:
            with open(shared, "wb", closefd=False) as file:
                pickle.dump(work, file)
            with _for_children():
                path = f"/proc/{os.getpid()}/fd/{shared}"
                futures = {pool.submit(_prepare, path, group): group for group in groups}
            for future in as_completed(futures):
                group, record = futures.pop(future), future.result()
                records[group.number] = record
                advance(group.bytes, sum(shard.tokens for shard in record.shards.values()))
            pool.shutdown()
        finally:
            held.close()  # ends the processes in the middle of their groups: neither an error nor Ctrl-C waits for them
            alive.close()
            pool.shutdown(cancel_futures=True)
            os.close(shared)


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
    """A process of the pool, with what every group needs.

    It is read here, once: it may have the whole of a tokenizer in it, and what a process that begins is sent must fit
    into a pipe, or one that dies meanwhile is waited for without end.
    """

    work: Work | None = None


def _begin(alive: Connection) -> None:
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive: Connection) -> None:
    """End this process as soon as nobody holds the other end: the parent may be killed, too."""
    alive.poll(None)
    os._exit(1)


def _prepare(path: str, group: Group) -> Record:
    try:
        if _Process.work is None:
            with open(path, "rb") as file:
                _Process.work = pickle.load(file)  # noqa: S301  (our parent's)
        return prepare_group(_Process.work, group, keep=True)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301  (its own)
        except Exception:  # noqa: BLE001  (whatever its class does)
            kind = next(each for each in (OSError, ValueError, RuntimeError, Exception) if isinstance(error, each))
            raise kind(f"{type(error).__name__}: {error}") from None
        raise
