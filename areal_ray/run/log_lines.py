"""Lines of JSON in the bytes of a log."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from areal_ray.storage import Storage

Line = dict[str, Any]
_BLOCK_BYTES = 1 << 16  # some hundred lines: what is looked for at the end of a log is there, mostly
_SCAN_BYTES = 8 << 20


def encode(line: Line) -> bytes:
    return json.dumps(line).encode() + b"\n"


def decode(text: bytes) -> list[Line]:
    """The lines of a text, but for those that a crash tore in the middle of a write."""
    return [line for raw in text.splitlines() if (line := decode_one(raw)) is not None]


def decode_one(raw: bytes) -> Line | None:
    """One line; None if it is torn: what it said happened around a crash."""
    try:
        line: Line = json.loads(raw)
        return line
    except ValueError:
        return None


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
        end = begin


def scan(storage: Storage, name: str, begin: int, end: int, wanted: re.Pattern[bytes]) -> tuple[list[Line], int]:
    """The lines between two offsets of a file in which a pattern is found, and the offset where whole lines end.

    Only those are decoded: a tenth of a second for a million lines. A last line that is being written, or was torn, is
    left for the next time.
    """
    lines: list[Line] = []
    at, length = begin, _SCAN_BYTES
    last = begin == end
    while not last:
        data = storage.read_range(name, at, min(length, end - at))
        last = len(data) < length
        whole = data.rfind(b"\n") + 1
        if last and decode_one(data[whole:]) is not None:  # it lacks nothing but its end
            whole = len(data)
        lines += _matching(data, whole, wanted)
        at += whole
        length = length if whole else 2 * length  # a line longer than that
    return lines, at


def _matching(data: bytes, size: int, wanted: re.Pattern[bytes]) -> list[Line]:
    """The lines among the first `size` bytes in which the pattern is found."""
    lines, end = [], 0
    for match in wanted.finditer(data, 0, size):
        if match.start() < end:  # a second time in the same line
            continue
        begin = data.rfind(b"\n", 0, match.start()) + 1
        end = data.find(b"\n", match.end(), size)
        end = size if end < 0 else end
        if (line := decode_one(data[begin:end])) is not None:
            lines.append(line)
    return lines
