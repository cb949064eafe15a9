"""Forks ranks from a process that has imported torch and transformers: most of a rank's CPU time is those imports.

Run as `python -m tests.distributed.rank_server DESCRIPTOR [MODULE ...]`, by `RankServer` in the tests' own process.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_LEAVE, _END = "leave", "end"


class RankServer:
    """A server process; it and its ranks end with the process that made it.

    Args:
        environment: variables that are read when libraries are imported.
        modules: imported before the first fork.
    """

    def __init__(self, environment: dict[str, str], modules: Sequence[str] = ()) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "tests.distributed.rank_server", str(theirs.fileno()), *modules]
        self._process = subprocess.Popen(
            command, env=environment, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self.connection = Connection(ours.detach())

    def fork(self, environments: dict[int, dict[str, str]], job: bytes) -> None:
        """Forks a process per rank, each with its environment.

        `connection` then has (rank, outcome, exit code) for each: the pickled (failure, result) and None, or None and
        the exit code of a rank that died before it had an outcome. Ranks with an outcome stay until `leave`: rank 0 has
        the store that others may still need. At the end, when no process is left, `connection` has None.

        Args:
            job: pickled (function, args).
        """
        self.connection.send((environments, os.getcwd(), job))

    def leave(self) -> None:
        """Lets the ranks end, when all of them have an outcome."""
        self.connection.send(_LEAVE)

    def end(self) -> None:
        """Kills the ranks that still run, and waits until no process is left."""
        self.connection.send(_END)
        while self.connection.recv() is not None:
            pass

    def close(self) -> None:
        self.connection.close()
        self._process.wait()


class _Rank:
    """A fork of the server.

    Attributes:
        pipe: its outcome comes from here, and its leave to end goes there.
        outcome: as it came; empty if its end of the pipe was closed before.
        ended: a descriptor that is readable when the process has ended.
    """

    def __init__(self, number: int, environment: dict[str, str], folder: str, job: bytes, server: Connection) -> None:
        self.number = number
        self.outcome: bytes | None = None
        self._exit_code: int | None = None
        self.pipe, theirs = Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            server.close()
            self.pipe.close()  # so that the end of the server is the end of the pipe
            _train(theirs, environment, folder, job)
        theirs.close()  # so that the end of the rank is the end of the pipe
        self.ended = os.pidfd_open(self._pid)

    def exit_code(self) -> int:
        """Its exit code, once it has ended."""
        if self._exit_code is None:
            self._exit_code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._exit_code

    def close(self) -> None:
        """Kills it if it still runs."""
        if self._exit_code is None:
            signal.pidfd_send_signal(self.ended, signal.SIGKILL)
        self.exit_code()
        os.close(self.ended)
        self.pipe.close()


def _train(pipe: Connection, environment: dict[str, str], folder: str, job: bytes) -> None:
    """Be the rank: the job, its outcome, and the end of this process."""
    code = 1
    faulthandler.enable()  # a rank that a library ends says where it was
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()  # Python's own generator is seeded anew in a fork, this one is not
        try:
            function, args = pickle.loads(job)  # noqa: S301  (from our own client)
            outcome: tuple[str | None, Any] = (None, function(int(environment["RANK"]), *args))
        except BaseException:  # noqa: BLE001  (raised again by the client)
            outcome = (traceback.format_exc(), None)
        pipe.send_bytes(pickle.dumps(outcome))
        pipe.recv()
        distributed = sys.modules.get("torch.distributed")
        if outcome[0] is None and distributed is not None and distributed.is_initialized():
            distributed.destroy_process_group()
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(connection: Connection) -> None:
    while (request := connection.recv()) is not None:
        if request == _END:  # it came when all had ended
            continue
        environments, folder, job = request
        ranks = [_Rank(number, own, folder, job, connection) for number, own in environments.items()]
        try:
            _follow(connection, ranks)
        finally:
            for rank in ranks:
                rank.close()
        connection.send(None)


def _follow(connection: Connection, ranks: list[_Rank]) -> None:
    """Hand on what the ranks send, until all have ended or the client ends them."""
    while ranks:
        pipes = [rank.pipe for rank in ranks if rank.outcome is None]
        ready = wait([connection, *pipes, *(rank.ended for rank in ranks)])
        if connection in ready:
            if connection.recv() == _END:
                return
            for rank in ranks:
                with suppress(BrokenPipeError):  # it was killed meanwhile
                    rank.pipe.send(None)
            continue
        for rank in ranks:
            if rank.outcome is None and rank.pipe.poll():
                try:
                    rank.outcome = rank.pipe.recv_bytes()
                    connection.send((rank.number, rank.outcome, None))
                except EOFError:
                    rank.outcome = b""
            if rank.ended in ready and not rank.outcome:
                connection.send((rank.number, None, rank.exit_code()))
        ranks = [rank for rank in ranks if rank.ended not in ready]


def main() -> None:
    descriptor, *modules = sys.argv[1:]
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)  # as in fork_server_main.py
    for name in modules:
        import_module(name)
    gc.collect()
    gc.freeze()  # or the first collection in each fork would copy every page
    try:
        _serve(Connection(int(descriptor)))
    except (EOFError, ConnectionError):  # the client is gone
        return


if __name__ == "__main__":
    main()
