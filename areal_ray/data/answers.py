"""What frozen models have said of each row of a data set: kept beside the corpora, so that they are asked once.

Addressed by the row's number, like the rows: no number of ranks is in it, and a run of another size reads the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from areal_ray.data.dataset import TokenDataset
from areal_ray.storage import Storage

_DIGEST = 16  # bytes of the hash at the end of a file


class AnsweredRows:
    """The rows of a data set, each with what frozen models say of it. A TokenDataset of the same fingerprint.

    Args:
        rows: the data set.
        answers: arrays (len(rows), ...) by name. All of them are in the memory of every rank: for the two numbers of a
            preference pair 8 bytes a row.
    """

    def __init__(self, rows: TokenDataset, answers: Mapping[str, np.ndarray]) -> None:
        assert all(len(values) == len(rows) for values in answers.values())
        self._rows, self._answers = rows, answers

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return self._rows[indices] | {name: values[np.asarray(indices)] for name, values in self._answers.items()}

    @property
    def fingerprint(self) -> str:
        """That of the rows: answers follow from them."""
        return self._rows.fingerprint

    def __getattr__(self, name: str) -> Any:
        """What else a data set may have: order, metrics, note, old_fingerprint."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._rows, name)


class AnswerFile:
    """Answers about all rows of one data set: (rows, width) in float32, with a hash of their bytes at the end.

    Until all are there, each piece of rows is a file of its own, so that who goes on has to ask no more than what was
    under way. What is torn or is of another size counts as not there.

    Args:
        storage: the directory.
        name: of the file.
        rows: how many there are.
        piece: rows that become durable at a time.
    """

    def __init__(self, storage: Storage, name: str, rows: int, piece: int) -> None:
        self._storage, self._name, self._rows = storage, name, rows
        self.pieces = [range(first, min(first + piece, rows)) for first in range(0, rows, piece)]

    def read(self) -> np.ndarray | None:
        """All answers; None if they are not complete."""
        return self._read(f"{self._name}.bin", self._rows)

    def missing(self) -> list[range]:
        """The pieces about which nobody has been asked yet; none of them where all answers are there."""
        if self.read() is not None:
            return []
        there = set(self._storage.names())
        return [p for p in self.pieces if self._piece(p) not in there or self._read(self._piece(p), len(p)) is None]

    def write(self, piece: range, answers: np.ndarray) -> None:
        """Make a piece durable; several jobs may do so at a time."""
        assert len(answers) == len(piece)
        self._write(self._piece(piece), answers)

    def finish(self) -> None:
        """Put all pieces together, and remove them, if that is not done yet."""
        if self.read() is not None:
            return
        parts = [self._read(self._piece(piece), len(piece)) for piece in self.pieces]
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):  # another job has finished it meanwhile, and removed them
            assert self.read() is not None, f"{self._name}: {len(whole)} of {len(parts)} pieces"
            return
        self._write(f"{self._name}.bin", np.concatenate(whole))
        for piece in self.pieces:
            try:
                self._storage.remove(self._piece(piece))
            except FileNotFoundError:  # by another job that has finished it, too
                continue

    def _piece(self, piece: range) -> str:
        return f"{self._name}-{piece.start:012}.part"

    def _read(self, name: str, rows: int) -> np.ndarray | None:
        try:
            data = self._storage.read(name)
        except FileNotFoundError:
            return None
        values, digest = data[:-_DIGEST], data[-_DIGEST:]
        if xxhash.xxh3_128_digest(values) != digest or len(values) % (4 * rows):
            return None
        return np.frombuffer(values, "<f4").reshape(rows, -1)

    def _write(self, name: str, answers: np.ndarray) -> None:
        values = np.ascontiguousarray(answers, "<f4").tobytes()
        with self._storage.create_whole(name) as sink:
            sink.write(values + xxhash.xxh3_128_digest(values))
