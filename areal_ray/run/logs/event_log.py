"""Event logs of a run: lines of JSON that are added one by one and survive a crash.

Where files can grow a log is one file. Where they cannot (object storage) it is a directory of objects.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import xxhash

from areal_ray.run.logs.log_lines import Decoder, Line, backwards, encode, forwards, scan
from areal_ray.run.logs.object_log import ObjectLog
from areal_ray.storage import Storage

_TAIL_BYTES = 1 << 16
_CHECK_BYTES = 1 << 10


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

    def lines(self) -> Iterator[Line]:
        """All durable lines; what a crash tore in the middle of a write, or is no line of this log, is left out."""
        ...

    def news(self) -> str | None:
        """A sentence about what was found unreadable since this was asked for the last time; None if nothing was."""
        ...

    def tail(self) -> list[Line]:
        """Some of the last lines, the last one among them; empty if there is none. Does not grow with the log."""
        ...

    def keep(self, wanted: Callable[[Line], bool]) -> None:
        """Take all other lines back. They are at the end of the log: it is read back from there, and no further than
        until a good many lines have been seen that stay."""
        ...

    def since(self, seen: dict[str, Any], wanted: re.Pattern[bytes]) -> tuple[list[Line], dict[str, Any]] | None:
        """The lines after those that were seen before in which a pattern is found.

        Args:
            seen: what the last call returned; empty: all lines.
            wanted: is looked for in the text of a line.

        Returns:
            The lines, and how much has been seen by now (JSON values); None if this is not the log that was seen.
        """
        ...

    def sort(self, lines: list[Line]) -> list[Line]:
        """The lines of several calls of `since` in the order of `lines`."""
        ...


def _anybody() -> None:
    """Lets everybody write."""


def open_log(
    storage: Storage,
    name: str,
    at_once: bool,
    is_good: Callable[[Line], bool] = lambda line: True,
    may_write: Callable[[], None] = _anybody,
) -> Log:
    """The log `name` in a directory.

    Args:
        may_write: called before lines are written, once for all that wait; raises what `append` is to raise, or the
            next one if it is written in the background.
        at_once: whether `append` returns when the line is durable. If not, object storage is written to in the
            background: a line of metrics is not worth a round trip of training.
        is_good: whether an object is a line of this log; any other is left out, as one that is torn.
    """
    decode = Decoder(is_good)
    if storage.can_append:
        return FileLog(storage, f"{name}.jsonl", decode, may_write)
    return ObjectLog(storage.sub(name), at_once, decode=decode, may_write=may_write)


class FileLog:
    """A file that grows.

    Args:
        storage: one that can append.
        name: of the file in it.
        decode: decodes its lines.
        may_write: as for `open_log`.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        decode: Decoder | None = None,
        may_write: Callable[[], None] = _anybody,
    ) -> None:
        self._storage, self._name, self._decode = storage, name, decode or Decoder()
        self._may_write = may_write
        self._unwritten = b""
        self._lock = threading.Lock()

    @property
    def location(self) -> str:
        return f"{self._storage.location}/{self._name}"

    def append(self, line: Line) -> None:
        with self._lock:
            self._unwritten += encode(line)
            self._write()

    def flush(self) -> None:
        with self._lock:
            self._write()

    def _write(self) -> None:
        if not self._unwritten:
            return
        self._may_write()
        # A line that a full disk or a power cut tore stays unreadable, but alone.
        self._storage.append(self._name, (b"\n" if self._is_torn() else b"") + self._unwritten)
        self._unwritten = b""

    def lines(self) -> Iterator[Line]:
        try:
            file = self._storage.open(self._name)
        except FileNotFoundError:
            return
        with file:
            yield from (line for raw in forwards(file) if (line := self._decode(raw)) is not None)

    def news(self) -> str | None:
        found = self._decode.news()
        return None if found is None else f"{self.location}: {found}"

    def tail(self) -> list[Line]:
        size = self._size()
        found: list[Line] = []
        for offset, raw in backwards(self._storage, self._name, size):
            if found and offset < size - _TAIL_BYTES:
                break
            if (line := self._decode(raw)) is not None:
                found.append(line)
        return found[::-1]

    def keep(self, wanted: Callable[[Line], bool]) -> None:
        with self._lock:
            self._may_write()
            self._unwritten = b"".join(encode(line) for line in self._decode.lines(self._unwritten) if wanted(line))
            size = self._size()
            cut, staying, after_cut, quiet = size, list[bytes](), 0, 0
            for offset, raw in backwards(self._storage, self._name, size):
                if (line := self._decode(raw)) is None:
                    continue
                if wanted(line):
                    staying.append(raw + b"\n")
                    quiet += len(raw)
                    # No further: only what an attempt wrote while it was being ended can lie among lines that stay.
                    if quiet > _TAIL_BYTES:
                        break
                else:
                    cut, after_cut, quiet = offset, len(staying), 0
            if after_cut:
                kept = b"".join(reversed(staying[:after_cut]))
                self._storage.replace(self._name, self._storage.read_range(self._name, 0, cut) + kept)
            elif cut < size:
                self._storage.truncate(self._name, cut)

    def since(self, seen: dict[str, Any], wanted: re.Pattern[bytes]) -> tuple[list[Line], dict[str, Any]] | None:
        begin, size = seen.get("bytes", 0), self._size()
        if seen and not (isinstance(begin, int) and 0 < begin <= size and self._check(begin) == seen.get("check")):
            return None
        lines, end = scan(self._storage, self._name, begin, size, wanted, self._decode)
        return lines, {"bytes": end, "check": self._check(end)} if end else {}

    def sort(self, lines: list[Line]) -> list[Line]:
        return lines

    def _size(self) -> int:
        try:
            with self._storage.open(self._name) as file:  # opened: what NFS has cached of a file's size may be old
                return file.seek(0, 2)
        except FileNotFoundError:
            return 0

    def _check(self, size: int) -> str:
        """What tells this log from another one, or from itself after somebody has edited it."""
        begin = max(0, size - _CHECK_BYTES)
        return xxhash.xxh3_64_hexdigest(self._storage.read_range(self._name, begin, size - begin))

    def _is_torn(self) -> bool:
        if not self._storage.size(self._name):
            return False
        with self._storage.open(self._name) as file:
            file.seek(-1, 2)
            return file.read(1) != b"\n"
