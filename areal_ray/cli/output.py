"""Standard output that can be lost, on a full device or as a pipe that nobody reads any more."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class LosableOutput:
    """A stream that goes on without its reader: what cannot be written, and all that follows, is dropped.

    A run must not end because its terminal has: that loses training, where the output is in the run's ledger, too.

    Args:
        stream: standard output.

    Attributes:
        lost: why it is dropped; None: it is not.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        self.lost = error
        # What is in the stream's buffer still, and what child processes write, goes there, too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._stream.fileno())
        finally:
            os.close(nowhere)


@contextmanager
def losable_output() -> Iterator[LosableOutput]:
    """Let standard output be one while the block lasts."""
    before = sys.stdout
    output = LosableOutput(before)
    if before is not None:  # there is none at all if its descriptor was closed
        sys.stdout = output
    try:
        yield output
        print(end="", flush=True)
    finally:
        sys.stdout = before
