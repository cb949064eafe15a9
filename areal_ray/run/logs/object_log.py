"""Logs where files cannot grow: every process that writes has an object of its own.

It writes it anew, whole, as it grows.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from areal_ray.run.fence import RunTaken
from areal_ray.run.logs.log_lines import Decoder, Line, encode, scan
from areal_ray.storage import Storage

_PART_BYTES = 1 << 20
_NAME = re.compile(r"(\d+\.\d+)-[0-9a-f]+\.jsonl")


class ObjectLog:
    """A directory of objects, one for every process that writes, in the order in which they were begun.

    Args:
        storage: the directory.
        at_once: whether `append` waits until the line is durable.
        part_bytes: a longer object is left as it is and another one begun: each is written again with every line.
        decode: decodes the lines.
        may_write: as for `open_log`.
    """

    def __init__(
        self,
        storage: Storage,
        at_once: bool,
        part_bytes: int = _PART_BYTES,
        decode: Decoder | None = None,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        self._storage, self._at_once, self._part_bytes = storage, at_once, part_bytes
        self._decode, self._may_write = decode or Decoder(), may_write
        self._refused: RunTaken | None = None  # in the background
        self._lock, self._upload = threading.Lock(), threading.Lock()
        self._name, self._text, self._changed = "", b"", False
        self._newest = 0.0  # when the newest object was begun, as `keep` has seen it
        self._thread: ThreadPoolExecutor | None = None
        self._draining: Future[None] | None = None

    @property
    def location(self) -> str:
        return self._storage.location

    def append(self, line: Line) -> None:
        with self._lock:
            if self._refused is not None:
                raise self._refused
            if not self._name or (len(self._text) > self._part_bytes and not self._changed):
                # After what there was: the clock of the node before may be ahead.
                self._newest = max(time.time(), self._newest + 1e-6)
                self._name, self._text = f"{self._newest:.6f}-{secrets.token_hex(3)}.jsonl", b""
            self._text += encode(line)
            self._changed = True
            begin = not self._at_once and self._draining is None
            if begin:
                self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="log")
                self._draining = self._thread.submit(self._drain)
        if self._at_once:
            self._write()

    def flush(self) -> None:
        self._write()

    def lines(self) -> Iterator[Line]:
        lines = [line for name in self._names() for line in self._decode.lines(self._storage.read(name))]
        yield from self.sort(lines)

    def news(self) -> str | None:
        found = self._decode.news()
        return None if found is None else f"{self.location}: {found}"

    def sort(self, lines: list[Line]) -> list[Line]:
        return sorted(lines, key=lambda line: line.get("time", 0.0))  # several processes may write at a time

    def tail(self) -> list[Line]:
        for name in reversed(self._names()):
            if lines := self._decode.lines(self._storage.read(name)):
                return lines
        return []

    def keep(self, wanted: Callable[[Line], bool]) -> None:
        self._write()
        with self._upload:
            self._may_write()
            names = self._names()
            self._keep(wanted, names)
            with self._lock:  # what this process has written so far is changed; what comes goes into a new object
                self._name, self._text = "", b""
                self._newest = max(self._newest, _begun(names))

    def _keep(self, wanted: Callable[[Line], bool], names: Sequence[str]) -> None:
        """Read the newest objects, until one stays as it is: those of one attempt were begun after all of the one
        before, which had been kept then to where that one began."""
        for name in reversed(names):
            lines = self._decode.lines(self._storage.read(name))
            kept = [line for line in lines if wanted(line)]
            if not lines:  # nothing that can be read, and not ours to delete
                continue
            if not kept:
                self._storage.remove(name)
            elif len(kept) != len(lines):
                self._storage.replace(name, b"".join(map(encode, kept)))
            else:
                return

    def since(self, seen: dict[str, Any], wanted: re.Pattern[bytes]) -> tuple[list[Line], dict[str, Any]] | None:
        sizes = {name: size for name, size in self._storage.sizes().items() if _NAME.fullmatch(name)}
        if not all(isinstance(size, int) and 0 <= size <= sizes.get(name, -1) for name, size in seen.items()):
            return None
        lines: list[Line] = []
        now = dict(seen)
        for name, size in sorted(sizes.items()):
            if size > now.get(name, 0):
                found, now[name] = scan(self._storage, name, now.get(name, 0), size, wanted, self._decode)
                lines += found
        return lines, now

    def _names(self) -> list[str]:
        """Names of the objects, the oldest first; what somebody else has put beside them is none."""
        return [name for name in self._storage.names() if _NAME.fullmatch(name)]

    def _drain(self) -> None:
        """Write until nothing was added in the meantime. What cannot be written waits for the next line, or `flush`."""
        while True:
            failed = False
            try:
                self._write()
            except OSError:
                failed = True
            except RunTaken as error:
                self._refused, failed = error, True
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
                self._may_write()
                self._storage.replace(name, text)
            except (OSError, RunTaken):
                with self._lock:
                    self._changed = True
                raise


def _begun(names: Sequence[str]) -> float:
    """When the newest of these objects was begun; 0.0 if none has a name of ours."""
    found = (_NAME.fullmatch(name) for name in names)
    return max((float(match[1]) for match in found if match), default=0.0)
