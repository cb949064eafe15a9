"""What flows from sources to a prepared corpus: parts, documents, tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Part:
    """A piece of a source that gives the same documents wherever it is read.

    Args:
        path: file, or name in an archive.
        begin, end: bytes of it, for formats that can be cut at lines, or rows of a data set; end None: to its end.
        size: bytes of the file, or rows of the data set.
        split: train or held_out, if all of its documents go there; None: each by its content.
        bytes: about how many it is, if begin and end do not say; for grouping and progress.
    """

    path: str
    begin: int = 0
    end: int | None = None
    size: int = 0
    split: str | None = None
    bytes: int | None = None


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
    """Documents by parts; can be pickled.

    Attributes:
        skipped: how many documents were left out so far, by reason; it only grows, and a copy of it counts for itself.
        notes: lines that `parts` has for the user, on what it has left out.
    """

    skipped: Counter[str]
    notes: list[str]

    def parts(self) -> list[Part]:
        """All parts, in an order that is the same on every machine.

        Raises:
            ConfigError: if there is nothing to read.
        """
        ...

    def read(self, part: Part) -> Iterator[Document]:
        """The documents of a part, in order, in the memory of one of them.

        Raises:
            ConfigError: with file and line, if there is something that cannot be read.
        """
        ...


class Renderer(Protocol):
    """Tokens of a document; can be pickled.

    Attributes:
        fingerprint: of everything but the document that the tokens depend on.
        skipped: how many documents were left out so far, by reason, as a Source's.
    """

    skipped: Counter[str]

    @property
    def fingerprint(self) -> str: ...

    def __call__(self, document: Document) -> Iterator[Tokens]:
        """The tokens of a document, one after the other; what an iterator gives belongs to one document.

        Raises:
            ConfigError: with file and line, if the record cannot be rendered.
        """
        ...
