"""Keeps the memory of a process that dies until the process that takes its place asks for it.

The memory is anonymous files, which live as long as some process has them open: here a child that does nothing else,
and imports neither torch nor Ray. It ends when it is released, when it has handed the memory over, with its owner (the
node's own process), or when nobody has asked for too long. Nothing is left in any directory.

A keeper listens under a name with a random part, so that nobody can take it before; a successor looks for it in the
kernel's table of sockets. Every user can read that table, and connect: both ends check who the other is. Whatever
others do there, the worst is that a copy is not found.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import xxhash

from areal_ray.processes.launch import address, check_peer

WAIT_S = 120.0  # for a successor, after the death; so long the memory of a run that was given up stays taken
_CLAIM_S = 30.0  # for an answer: the process before may be dying still, for seconds where it has a GPU or much memory
_LOOK_S = 0.01
_RELEASE = b"."
_MOST = 8  # files
_QUEUE = 64  # connections of others that are seen to before the successor's
_RANDOM = re.compile(r"(.+)~[0-9a-f]{16}")
_HEAD = struct.Struct("<QQ")  # of a record: its length, xxh3_64
_TAIL = struct.Struct("<Q")  # behind it, at the end of the file: where the record begins


class MemoryKeeper:
    """The parent's end: a child that has these files open, too.

    Args:
        name: under which the successor asks for them; of a run and a place in it.
        files: file descriptors, in an order that the successor knows.
        owner: process id; the child ends with it. None: it has no owner.

    Raises:
        OSError: if the child cannot be started.
    """

    def __init__(self, name: str, files: Sequence[int], owner: int | None) -> None:
        assert 0 < len(files) <= _MOST, files
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address(f"{name}~{secrets.token_hex(8)}"))
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


def claim(name: str, wait_s: float = _CLAIM_S) -> list[int]:
    """Take over the files of a process of that name that has died; each can be taken once.

    Args:
        name: as for MemoryKeeper.
        wait_s: seconds to wait for an answer: a process that lives keeps its files.

    Returns:
        File descriptors; none if there are no such files, or others are in the way.
    """
    deadline, files = time.monotonic() + wait_s, list[int]()
    untried = [address for each, address in _keepers(name) if each == name]
    with ExitStack() as connections, selectors.DefaultSelector() as waiting:
        while True:
            untried = [address for address in untried if not _connect(address, connections, waiting)]
            if not untried and not waiting.get_map():  # gone since they were listed: there is nobody to wait for
                break
            left = deadline - time.monotonic()
            for key, _ in waiting.select(max(0.0, min(left, _LOOK_S) if untried else left)):
                waiting.unregister(key.fileobj)
                files += _take(key.data)
            if left <= 0 or (files and not waiting.get_map()):
                break
    return files


def _take(connection: socket.socket) -> list[int]:
    """The files that a keeper sends, which hears that they have come; none if it is gone."""
    files: list[int] = []
    try:
        files = socket.recv_fds(connection, 1, _MOST)[1]
        connection.send(_RELEASE)
    except ConnectionError:
        for file in files:  # it keeps them for another one
            os.close(file)
        return []
    return files


def _connect(address: str, connections: ExitStack, waiting: selectors.BaseSelector) -> bool:
    """Connect to a keeper and wait for its answer, or see that it is none; False if it is to be tried again."""
    connection = connections.enter_context(socket.socket(socket.AF_UNIX))
    connection.setblocking(False)
    try:
        connection.connect(address)
        check_peer(connection)
        waiting.register(connection, selectors.EVENT_READ, connection)
    except BlockingIOError:  # its queue is full; it sees to that when its process has died
        connection.close()
        return False
    except OSError:  # gone, or somebody else's
        connection.close()
    return True


def kept_names(prefix: str) -> list[str]:
    """Names that begin so under which files are kept on this machine, sorted; others may have made some of them up."""
    return sorted({name for name, _ in _keepers(prefix)})


def _keepers(prefix: str) -> list[tuple[str, str]]:
    """Names that begin so and their addresses in the kernel's table of Unix sockets; none where it cannot be read."""
    before, after = address("|").removeprefix("\0").split("|")
    try:
        # Of others there may be any bytes, line ends among them.
        lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    found = set()
    for path in (columns[-1] for columns in map(str.split, lines) if columns):
        if path.startswith(f"@{before}{prefix}") and path.endswith(after):
            kept = path.removeprefix(f"@{before}").removesuffix(after)
            if (match := _RANDOM.fullmatch(kept)) is not None:
                found.add((match[1], address(kept)))
    return sorted(found)


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
    deadline = time.monotonic() + WAIT_S  # however often others knock
    while (left := deadline - time.monotonic()) > 0:
        if {number for number, _ in waiting.poll(left * 1e3)} != {listener.fileno()}:
            return
        connection, _ = listener.accept()
        with connection:
            try:
                check_peer(connection)
                socket.send_fds(connection, [_RELEASE], files)
                connection.settimeout(_CLAIM_S)
                # Not before it has them: it checks that this process is there, and may die before that.
                if connection.recv(1):
                    return
            except OSError:  # of somebody else, or it has died as well: wait for the next
                continue


def main(parent: str, owner: str, listener: str, *files: str) -> None:
    # Before the fork: where there are no such processes, as in another container, it has not started.
    processes = os.pidfd_open(int(parent)), os.pidfd_open(int(owner)) if int(owner) else None
    theirs, ours = os.pipe()
    if os.fork() == 0:
        os.close(theirs)
        own = socket.socket(fileno=int(listener))
        own.listen(_QUEUE)  # in this process: the successor asks the kernel who has done it, and that it is there
        os.close(ours)
        _keep(*processes, own, [int(number) for number in files])
    else:
        os.close(ours)
        os.read(theirs, 1)  # until it listens


if __name__ == "__main__":
    main(*sys.argv[1:])
