"""What flows from sources to a prepared corpus: parts, documents, tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Part:
    """A piece of a source that gives the same documents wherever it is read.

    Args:
        path: file, or name in an archive.
        begin, end: bytes of it, for formats that can be cut at lines; end None: to its end.
        size: bytes of the file.
    """

    path: str
    begin: int = 0
    end: int | None = None
    size: int = 0


@dataclass(frozen=True)
class Document:
    """Args:
    content: text as UTF-8 bytes, or a record.
    origin: "path" or "path:line", for messages.
    """

    content: bytes | dict[str, Any]
    origin: str


@dataclass(frozen=True)
class Tokens:
    """Args:
    ids: 1-D, uint32.
    predicted: 1-D, bool: which of them are predicted; None: all of them.
    group: of preference data: chosen or rejected, which come as pairs.
    """

    ids: np.ndarray
    predicted: np.ndarray | None = None
    group: str = "text"


class Source(Protocol):
    def parts(self) -> list[Part]: ...

    def read(self, part: Part) -> Iterator[Document]: ...


class Renderer(Protocol):
    @property
    def fingerprint(self) -> str: ...

    def __call__(self, document: Document) -> Iterator[Tokens]: ...
