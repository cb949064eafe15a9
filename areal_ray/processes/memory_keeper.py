"""Keeps memory of a process that dies until the one that takes its place asks for it.

The memory is anonymous files, which live as long as somebody has them open: here a child that does nothing else, and
imports neither torch nor Ray. It ends when it is released, when it has handed the memory over, with the process that
it belongs to (the node's own), or when nobody has asked for too long. Nothing is left in any directory.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Sequence

from areal_ray.processes.launch import address, check_peer

WAIT_S = 120.0  # for a successor, after the death; so long the memory of a run that was given up stays taken
_CLAIM_S = 2.0  # for an answer: the process before may be dying still
_RELEASE = b"."
_MOST = 8  # files


class MemoryKeeper:
    """The parent's end: a child that has these files open, too.

    Args:
        name: under which the successor asks for them; unique to a run and a place in it.
        files: file descriptors, in an order that the successor knows.
        owner: process id; the child ends with it. None: nobody's.

    Raises:
        OSError: if the child cannot be started, or there is one of that name.
    """

    def __init__(self, name: str, files: Sequence[int], owner: int | None) -> None:
        assert 0 < len(files) <= _MOST, files
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address(name))
            listener.listen(4)
            kept = [listener.fileno(), *files]
            processes = os.getpid(), owner or 0
            command = [sys.executable, "-m", "areal_ray.processes.memory_keeper", *map(str, (*processes, *kept))]
            # A session of its own, and (see `main`) no child of this process: Ray ends those with it.
            # Nor has it this one's output: who reads that to its end would wait for the child, too.
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=kept,
                start_new_session=True,
            )
        if child.wait() != 0:
            raise OSError(f"the process that keeps memory did not start (exit status {child.returncode})")
        assert child.stdin is not None
        self._pipe = child.stdin

    def release(self) -> None:
        """Let the child end, and the memory go."""
        try:
            self._pipe.write(_RELEASE)
            self._pipe.close()
        except BrokenPipeError:  # it is gone
            return


def claim(name: str) -> list[int]:
    """The files of a process of that name that has died, once: file descriptors; none if there are none."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_CLAIM_S)
        try:
            connection.connect(address(name))
            check_peer(connection)
            _, files, *_ = socket.recv_fds(connection, 1, _MOST)
        except (ConnectionError, TimeoutError):
            return []
    return list(files)


def _keep(parent: int, owner: int | None, listener: socket.socket, files: list[int]) -> None:
    """Wait for the end of the parent, then for its successor; processes by their file descriptors."""
    waiting = select.poll()
    # The process itself, too: one that it has forked may have its end of the pipe still.
    for number in (0, parent):
        waiting.register(number, select.POLLIN)
    if owner is not None:
        waiting.register(owner, select.POLLIN)
    ready = {number for number, _ in waiting.poll()}
    if owner in ready or (0 in ready and os.read(0, 1)):
        return
    for number in (0, parent):
        waiting.unregister(number)
    waiting.register(listener, select.POLLIN)
    while {number for number, _ in waiting.poll(WAIT_S * 1e3)} == {listener.fileno()}:
        connection, _ = listener.accept()
        with connection:
            try:
                check_peer(connection)
                socket.send_fds(connection, [_RELEASE], files)
                return
            except OSError:  # of another user, or it has died as well: wait for the next
                continue


def main(parent: str, owner: str, listener: str, *files: str) -> None:
    # Before the fork: where there are no such processes, as in another container, it has not started.
    processes = os.pidfd_open(int(parent)), os.pidfd_open(int(owner)) if int(owner) else None
    if os.fork() == 0:
        _keep(*processes, socket.socket(fileno=int(listener)), [int(number) for number in files])


if __name__ == "__main__":
    main(*sys.argv[1:])
