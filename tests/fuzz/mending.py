"""Checksums of a checkpoint made right again for what was changed: what a hostile writer would do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"


def write(path: Path, data: bytes) -> None:
    """Replace a file, which may be a link to one of the seed's."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


@contextmanager
def without_limit() -> Iterator[None]:
    """Lets json go as deep as a mutation went, which the product must not."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def mend(directory: Path, name: str) -> None:
    """Put the checksums of a file's bytes, as they are now, into whatever says them."""
    data = (directory / name).read_bytes()
    body = json.loads((directory / MANIFEST).read_bytes())
    if name == MANIFEST:
        seal(directory, body)
        return
    record = body["files"].setdefault(name, {})
    if "chunks" in record:
        record["chunks"] = [[at, size, _sum(data[at : at + size])] for at, size, _ in record["chunks"]]
    elif name.endswith(".distcp"):
        table = name.replace(".distcp", ".sums")
        _sum_pieces(directory / table, data)
        _record(body["files"][table], (directory / table).read_bytes())
    _record(record, data)
    seal(directory, body)


def seal(directory: Path, body: Any) -> None:
    """Write a manifest with the checksum that it has to have, whatever else is in it."""
    if type(body) is dict:
        body.pop("checksum", None)
        plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
        body["checksum"] = xxhash.xxh3_128_hexdigest(plain.encode())
    write(directory / MANIFEST, json.dumps(body).encode())


def _record(record: dict[str, Any], data: bytes) -> None:
    record.update({"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)})


def _sum(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def _sum_pieces(path: Path, data: bytes) -> None:
    head, *rows = path.read_text().splitlines()
    piece, at, lines = int(head.split()[2]), 0, [head]
    for row in rows:
        size, before, *_ = row.split()
        part = data[at : at + int(size)]
        at += int(size)
        sums = [_sum(part[first : first + piece]) for first in range(0, int(size), piece)]
        lines.append(" ".join([size, before, *sums]))
    write(path, "".join(f"{line}\n" for line in lines).encode())
