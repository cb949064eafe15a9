"""Event logs of a run: lines of JSON that are added one by one and survive a crash.

Where files can grow a log is one file. Where they cannot (object storage) every process that writes has an object of
its own, which it writes anew, whole, as it grows; a log is then a directory of them.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from areal_ray.storage import Storage

Line = dict[str, Any]
_PART_BYTES = 1 << 20


class Log(Protocol):
    """Lines in the order in which they were written."""

    @property
    def location(self) -> str:
        """The file or directory, as a user would type it."""
        ...

    def append(self, line: Line) -> None:
        """Add a line.

        Raises:
            OSError: if it could not be written. It is not lost: it goes with the next one that can.
        """
        ...

    def flush(self) -> None:
        """Wait until all lines are durable (OSError)."""
        ...

    def lines(self) -> list[Line]:
        """All durable lines; one that a crash tore in the middle of a write is left out."""
        ...

    def keep(self, wanted: Callable[[Line], bool]) -> None:
        """Take all other lines back."""
        ...


def open_log(storage: Storage, name: str, at_once: bool) -> Log:
    """The log `name` in a directory.

    Args:
        at_once: whether `append` returns when the line is durable. If not, object storage is written to in the
            background: a line of metrics is not worth a round trip of training.
    """
    return FileLog(storage, f"{name}.jsonl") if storage.can_append else ObjectLog(storage.sub(name), at_once)


class FileLog:
    """A file that grows.

    Args:
        storage: one that can append.
        name: of the file in it.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name
        self._unwritten = b""
        self._lock = threading.Lock()

    @property
    def location(self) -> str:
        return f"{self._storage.location}/{self._name}"

    def append(self, line: Line) -> None:
        with self._lock:
            self._unwritten += _encoded(line)
            self._write()

    def flush(self) -> None:
        with self._lock:
            self._write()

    def _write(self) -> None:
        if not self._unwritten:
            return
        # A line that a full disk or a power cut tore stays unreadable, but alone.
        self._storage.append(self._name, (b"\n" if self._is_torn() else b"") + self._unwritten)
        self._unwritten = b""

    def lines(self) -> list[Line]:
        return _decoded(self._storage.read(self._name)) if self._storage.size(self._name) is not None else []

    def keep(self, wanted: Callable[[Line], bool]) -> None:
        with self._lock:
            self._unwritten = b"".join(_encoded(line) for line in _decoded(self._unwritten) if wanted(line))
            lines = self.lines()
            kept = [line for line in lines if wanted(line)]
            if len(kept) != len(lines):
                self._storage.replace(self._name, b"".join(map(_encoded, kept)))

    def _is_torn(self) -> bool:
        if not self._storage.size(self._name):
            return False
        with self._storage.open(self._name) as file:
            file.seek(-1, 2)
            return file.read(1) != b"\n"


class ObjectLog:
    """A directory of objects, one for every process that writes, in the order in which they were begun.

    Args:
        storage: the directory.
        at_once: whether `append` waits until the line is durable.
        part_bytes: a longer object is left as it is and another one begun: each is written again with every line.
    """

    def __init__(self, storage: Storage, at_once: bool, part_bytes: int = _PART_BYTES) -> None:
        self._storage, self._at_once, self._part_bytes = storage, at_once, part_bytes
        self._lock, self._upload = threading.Lock(), threading.Lock()
        self._name, self._text, self._changed = "", b"", False
        self._thread: ThreadPoolExecutor | None = None
        self._draining: Future[None] | None = None

    @property
    def location(self) -> str:
        return self._storage.location

    def append(self, line: Line) -> None:
        with self._lock:
            if not self._name or (len(self._text) > self._part_bytes and not self._changed):
                self._name, self._text = f"{time.time():.6f}-{secrets.token_hex(3)}.jsonl", b""
            self._text += _encoded(line)
            self._changed = True
            begin = not self._at_once and self._draining is None
            if begin:
                self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="log")
                self._draining = self._thread.submit(self._drain)
        if self._at_once:
            self._write()

    def flush(self) -> None:
        self._write()

    def lines(self) -> list[Line]:
        lines = [line for name in self._storage.names() for line in _decoded(self._storage.read(name))]
        return sorted(lines, key=lambda line: line.get("time", 0.0))  # several processes may write at a time

    def keep(self, wanted: Callable[[Line], bool]) -> None:
        self._write()
        with self._upload:
            self._keep(wanted)
            with self._lock:  # what this process has written so far is changed; what comes goes into a new object
                self._name, self._text = "", b""

    def _keep(self, wanted: Callable[[Line], bool]) -> None:
        for name in self._storage.names():
            lines = _decoded(self._storage.read(name))
            kept = [line for line in lines if wanted(line)]
            if not kept:
                self._storage.remove(name)
            elif len(kept) != len(lines):
                self._storage.replace(name, b"".join(map(_encoded, kept)))

    def _drain(self) -> None:
        """Write until nothing was added in the meantime. What cannot be written waits for the next line, or `flush`."""
        while True:
            failed = False
            try:
                self._write()
            except OSError:
                failed = True
            with self._lock:
                if failed or not self._changed:
                    self._draining = None
                    return

    def _write(self) -> None:
        with self._upload:  # one after the other, or an older text could come last
            with self._lock:
                if not self._changed:
                    return
                name, text, self._changed = self._name, self._text, False
            try:
                self._storage.replace(name, text)
            except OSError:
                with self._lock:
                    self._changed = True
                raise


def _encoded(line: Line) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _decoded(text: bytes) -> list[Line]:
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # torn by a crash in the middle of a write; what it said happened around the crash
    return lines
