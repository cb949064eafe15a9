"""Lines of JSON in the bytes of a log."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import xxhash

from areal_ray.storage import Storage

Line = dict[str, Any]
_BLOCK_BYTES = 1 << 16  # some hundred lines: what is looked for at the end of a log is there, mostly
_SCAN_BYTES = 8 << 20
_LINE_BYTES = 16 << 20  # a longer one is none: zeros of a power cut, or something else that has no line ends
_MOST_TOLD = 1000  # unreadable lines that are told apart


def encode(line: Line) -> bytes:
    return json.dumps(line).encode() + b"\n"


class Decoder:
    """Decodes the lines of one log, and counts those that cannot be read.

    Args:
        is_good: whether an object is a line of this log.
    """

    def __init__(self, is_good: Callable[[Line], bool] = lambda line: True) -> None:
        self._is_good = is_good
        self._unreadable: dict[int, bool] = {}  # by checksum: a log is read more than once; whether it was told
        self._first = b""

    def __call__(self, raw: bytes) -> Line | None:
        """One line; None if it is empty, or torn, foreign or changed, and then it is counted."""
        line = self.whole(raw)
        if line is None and raw.strip() and len(self._unreadable) < _MOST_TOLD:
            if not self._first:
                self._first = raw.strip()[:60]
            self._unreadable.setdefault(xxhash.xxh3_64_intdigest(raw.rstrip(b"\r\n")), False)
        return line

    def whole(self, raw: bytes) -> Line | None:
        """One line; None if it is none, which is not counted: it may be being written."""
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            return None
        return line if type(line) is dict and self._is_good(line) else None

    def lines(self, text: bytes) -> list[Line]:
        """The lines of a text, but for those that cannot be read."""
        return [line for raw in text.splitlines() if (line := self(raw)) is not None]

    def news(self) -> str | None:
        """A sentence about the unreadable lines that were found since this was asked; None if there are none."""
        new = sum(not told for told in self._unreadable.values())
        if not new:
            return None
        self._unreadable = dict.fromkeys(self._unreadable, True)
        first, self._first = self._first.decode(errors="replace"), b""
        what = "1 line cannot be read and is" if new == 1 else f"{new} lines cannot be read and are"
        return f"{what} left out (torn, changed or foreign); it begins {first!r}"


def forwards(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is longer than any can be, the pieces."""
    while raw := file.readline(_LINE_BYTES):
        yield raw


def backwards(storage: Storage, name: str, size: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the first `size` bytes of a file, the last line first; reads as far as one goes on."""
    end, rest = size, b""
    while end > 0:
        begin = max(0, end - _BLOCK_BYTES)
        data = storage.read_range(name, begin, end - begin) + rest
        first = data.find(b"\n") + 1 if begin else 0  # where the first line begins that is here as a whole
        rest = data[:first] if first or not begin else data
        offset = begin + len(data)
        for raw in reversed(data[first:].split(b"\n") if first or not begin else []):
            offset -= len(raw)
            yield offset, raw
            offset -= 1  # the end of the line before
        if len(rest) > _LINE_BYTES:  # not carried on, or each block would copy all of it
            yield begin, rest
            rest = b""
        end = begin


def scan(
    storage: Storage, name: str, begin: int, end: int, wanted: re.Pattern[bytes], decode: Decoder
) -> tuple[list[Line], int]:
    """The lines between two offsets of a file in which a pattern is found, and the offset where whole lines end.

    Only those are decoded: a tenth of a second for a million lines; where it is one block at most, as at a restart, all
    are looked at, so that damage is noticed. A last line that is being written, or was torn, is left for the next time.
    """
    lines: list[Line] = []
    at, length = begin, _SCAN_BYTES
    last, few = begin == end, end - begin <= _SCAN_BYTES
    while not last:
        data = storage.read_range(name, at, min(length, end - at))
        last = len(data) < length
        whole = data.rfind(b"\n") + 1
        if (last and decode.whole(data[whole:]) is not None) or (not whole and len(data) >= _LINE_BYTES):
            whole = len(data)  # it lacks nothing but its end; or is no line, and would be read again and again
        if few:
            decode.lines(data[:whole])
        lines += _matching(data, whole, wanted, decode)
        at += whole
        length = length if whole else 2 * length  # a line longer than that
    return lines, at


def _matching(data: bytes, size: int, wanted: re.Pattern[bytes], decode: Decoder) -> list[Line]:
    """The lines among the first `size` bytes in which the pattern is found."""
    lines, end = [], 0
    for match in wanted.finditer(data, 0, size):
        if match.start() < end:  # a second time in the same line
            continue
        begin = data.rfind(b"\n", 0, match.start()) + 1
        end = data.find(b"\n", match.end(), size)
        end = size if end < 0 else end
        if (line := decode(data[begin:end])) is not None:
            lines.append(line)
    return lines
