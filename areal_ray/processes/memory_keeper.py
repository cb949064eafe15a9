"""Keeps the memory of a process that dies until the process that takes its place asks for it.

The memory is anonymous files, which live as long as some process has them open: here a child that does nothing else,
and imports neither torch nor Ray. It ends when it is released, when it has handed the memory over, with its owner (the
node's own process), or when nobody has asked for too long. Nothing is left in any directory.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from areal_ray.processes.launch import address, check_peer

WAIT_S = 120.0  # for a successor, after the death; so long the memory of a run that was given up stays taken
_CLAIM_S = 2.0  # for an answer: the process before may be dying still
_LOOK_S = 0.01
_RELEASE = b"."
_MOST = 8  # files
_HEAD = struct.Struct("<QQ")  # of a record: its length, xxh3_64
_TAIL = struct.Struct("<Q")  # behind it, at the end of the file: where the record begins


class MemoryKeeper:
    """The parent's end: a child that has these files open, too.

    Args:
        name: under which the successor asks for them; unique to a run and a place in it.
        files: file descriptors, in an order that the successor knows.
        owner: process id; the child ends with it. None: it has no owner.

    Raises:
        OSError: if the child cannot be started, or there is one of that name.
    """

    def __init__(self, name: str, files: Sequence[int], owner: int | None) -> None:
        assert 0 < len(files) <= _MOST, files
        with socket.socket(socket.AF_UNIX) as listener:
            _bind(listener, address(name))
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


def _bind(listener: socket.socket, name: str) -> None:
    """Take the name; the process that has handed over its memory under it may be about to end still."""
    deadline = time.monotonic() + _CLAIM_S
    while True:
        try:
            listener.bind(name)
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_S)


def claim(name: str, wait_s: float = _CLAIM_S) -> list[int]:
    """Take over the files of a process of that name that has died; each can be taken once.

    Args:
        name: as for MemoryKeeper.
        wait_s: seconds to wait for an answer: a process that lives keeps its files.

    Returns:
        File descriptors; none if there are no such files.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(wait_s)
        try:
            connection.connect(address(name))
            check_peer(connection)
            _, files, *_ = socket.recv_fds(connection, 1, _MOST)
        except (ConnectionError, TimeoutError):
            return []
    return list(files)


def kept_names(prefix: str) -> list[str]:
    """Names that begin so under which files are kept on this machine, sorted, as far as this process could claim them.

    Reads the kernel's table of Unix sockets, in which names of other users may stand, too.
    """
    before, after = address("|").removeprefix("\0").split("|")
    # Of others there may be any bytes, line ends among them.
    lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()
    paths = [columns[-1] for columns in map(str.split, lines) if columns]
    names = {
        path.removeprefix(f"@{before}").removesuffix(after)
        for path in paths
        if path.startswith(f"@{before}{prefix}") and path.endswith(after)
    }
    return sorted(names)


def write_record(file: int, at: int, record: dict[str, Any]) -> None:
    """Write a JSON record with its checksum into a kept file, at an offset in bytes, as the file's end (OSError)."""
    text = json.dumps(record).encode()
    os.pwrite(file, _HEAD.pack(len(text), xxhash.xxh3_64_intdigest(text)) + text + _TAIL.pack(at), at)


def read_record(file: int, at: int) -> dict[str, Any] | None:
    """The record that `write_record` wrote there; None if there is no whole one.

    To copy the bytes from there to the end of the file is to copy the record.
    """
    head = os.pread(file, _HEAD.size, at)
    if len(head) < _HEAD.size:
        return None
    length, digest = _HEAD.unpack(head)
    if length > os.fstat(file).st_size:
        return None
    text, tail = os.pread(file, length, at + _HEAD.size), os.pread(file, _TAIL.size, at + _HEAD.size + length)
    if xxhash.xxh3_64_intdigest(text) != digest or tail != _TAIL.pack(at):
        return None
    record: dict[str, Any] = json.loads(text)
    return record


def find_record(file: int) -> tuple[int, dict[str, Any]] | None:
    """Where the record at the end of a kept file begins, and the record; None if there is no whole one."""
    size = os.fstat(file).st_size
    tail = os.pread(file, _TAIL.size, size - _TAIL.size) if size >= _TAIL.size else b""
    at: int = _TAIL.unpack(tail)[0] if len(tail) == _TAIL.size else size
    record = read_record(file, at) if at < size else None
    return None if record is None else (at, record)


def free_memory() -> tuple[int, int]:
    """Bytes of memory, free and in all, on this machine or in this container, whichever is less."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    machine = {line[0]: int(line[1]) << 10 for line in lines}
    free, total = machine["MemAvailable:"], machine["MemTotal:"]
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container of its own, or "max"
        return free, total
    return min(free, limit - used), min(total, limit)


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
                listener.close()  # at once: the successor takes the name for a keeper of its own
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
