"""Documents that stay whole: one a row, or as many as fit into one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from areal_ray.config import ConfigError
from areal_ray.data.corpus.corpus import TokenStream
from areal_ray.data.corpus.manifest import digest
from areal_ray.data.dataset import IGNORED

Truncation = Literal["split", "error", "left", "right", "drop"]
_AT_ONCE = 1 << 20  # pieces that are Python's own numbers
_WIDTHS = 64  # widths of rows that are not filled are multiples of it


class Pieces(NamedTuple):
    """Stretches of a stream, none of them longer than a row.

    Args:
        begins: first token of each.
        lengths: tokens of each, at least one.
        note: what has become of documents that are longer; "" if none are.
    """

    begins: np.ndarray
    lengths: np.ndarray
    note: str


class Plan(NamedTuple):
    """Which pieces are in which row.

    Args:
        pieces: in the order of their rows.
        bounds: number of each row's first piece, and of all pieces.
    """

    pieces: Pieces
    bounds: np.ndarray


def pieces_of(lengths: np.ndarray, seq_len: int, truncation: Truncation) -> Pieces:
    """Documents as pieces that fit into a row; empty ones are none.

    Args:
        lengths: tokens of each document of a stream, in order.
        seq_len: tokens per row.
        truncation: of longer documents: their first tokens (right), their last ones (left), all in pieces (split),
            none of them (drop), or an error.

    Raises:
        ConfigError: for the last.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    begins, long = ends - lengths, lengths > seq_len
    note = ""
    if count := int(long.sum()):
        said = f"{count:,} of {len(lengths):,} documents are longer than train.seq_len={seq_len} tokens"
        if truncation == "error":
            text = f"{said} (the longest has {int(lengths.max()):,}); data.truncation=left, right or drop"
            raise ConfigError("data.truncation", text)
        done = {"split": "in pieces", "left": "without their beginning", "right": "without their end"}
        note = f"data: {said}: {done.get(truncation, 'left out')}"
    if truncation == "split":
        counts = -(-lengths // seq_len)
        number = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        begins = np.repeat(begins, counts) + number * seq_len
        lengths = np.minimum(np.repeat(ends, counts) - begins, seq_len)
    elif truncation == "left":
        begins = np.maximum(begins, ends - seq_len)
    keep = lengths > 0 if truncation != "drop" else (lengths > 0) & ~long
    return Pieces(begins[keep], np.minimum(lengths, seq_len)[keep], note)


def one_a_row(pieces: Pieces, seq_len: int = 0) -> Plan:
    """Each piece in a row of its own."""
    return Plan(pieces, np.arange(len(pieces.begins) + 1))


def best_fit(pieces: Pieces, seq_len: int) -> Plan:
    """Pieces from the longest to the shortest, each into the fullest row that has room for it (best-fit decreasing;
    Ding et al. 2024, arXiv:2404.10830). About a microsecond a document, and 50 bytes of memory while it runs."""
    order = np.argsort(-pieces.lengths, kind="stable")
    row_of = np.empty(len(order), np.int64)
    with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows by how many tokens fit into them
    rooms, rows = 0, 0  # bit n: there is a row with room for n
    for piece, length in _longest_first(pieces.lengths, order):
        fitting = rooms >> length
        room = length + (fitting & -fitting).bit_length() - 1 if fitting else seq_len
        if fitting:
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            row, rows = rows, rows + 1
        if left := room - length:
            with_room[left].append(row)
            rooms |= 1 << left
        row_of[piece] = row
    # Rows in the order of their first documents, so that those of one time in the corpus stay near each other.
    by_row = np.argsort(row_of, kind="stable")
    bounds = np.searchsorted(row_of[by_row], np.arange(rows + 1))
    return Plan(Pieces(pieces.begins[by_row], pieces.lengths[by_row], pieces.note), bounds)


def _longest_first(lengths: np.ndarray, order: np.ndarray) -> Iterator[tuple[int, int]]:
    for begin in range(0, len(order), _AT_ONCE):
        some = order[begin : begin + _AT_ONCE]
        yield from zip(some.tolist(), lengths[some].tolist(), strict=True)


class WholeRows:
    """Rows of whole documents, padded. A TokenDataset.

    Its plan takes 24 bytes a document in the memory of every rank, and twice that while it is made, which is when it is
    first needed.

    Args:
        stream: the documents.
        seq_len: tokens per row.
        arrange: `one_a_row` or `best_fit`.
        truncation: of documents that are longer than a row.
        document_mask: whether documents of a row are kept apart, by position_ids that begin anew; without that
            they are not, and an attention_mask leaves out what is padding.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        arrange: Callable[[Pieces, int], Plan],
        truncation: Truncation,
        document_mask: bool,
    ) -> None:
        self._stream, self._seq_len, self._arrange = stream, seq_len, arrange
        self._truncation, self._document_mask = truncation, document_mask

    @cached_property
    def _plan(self) -> Plan:
        lengths = self._stream.document_lengths()
        return self._arrange(pieces_of(lengths, self._seq_len, self._truncation), self._seq_len)

    @property
    def note(self) -> str:
        """What has become of documents that are longer than a row; "" if none are."""
        return self._plan.pieces.note

    def __len__(self) -> int:
        return len(self._plan.bounds) - 1

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of the given numbers, as wide as the longest of them needs, in steps of 64 tokens."""
        return rows_of(self._stream, self._plan, np.asarray(indices), self._seq_len, self._document_mask)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the stream's and of how rows are made of it; reads nothing."""
        about = (self._arrange.__name__, self._truncation, self._document_mask)
        return digest([*about, self._stream.fingerprint, self._seq_len])


def rows_of(
    stream: TokenStream, plan: Plan, indices: np.ndarray, seq_len: int, document_mask: bool = False
) -> dict[str, np.ndarray]:
    """Rows of a plan, padded to the width that the longest of them needs: a multiple of 64, so that there are few.

    Args:
        stream, plan: the tokens and where each row has them.
        indices: numbers of rows.
        seq_len: the widest that a row may be.
        document_mask: see `WholeRows`.
    """
    pieces, bounds = plan
    firsts, lasts = bounds[indices], bounds[indices + 1]
    chosen = np.concatenate([np.arange(first, last) for first, last in zip(firsts, lasts, strict=True)])
    row = np.repeat(np.arange(len(indices)), lasts - firsts)
    lengths = pieces.lengths[chosen]
    before = np.cumsum(lengths) - lengths
    at = before - before[np.searchsorted(row, np.arange(len(indices)))][row]
    shape = len(indices), min(seq_len, -(-int((at + lengths).max()) // _WIDTHS) * _WIDTHS)
    ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    filled, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    content = read_pieces(stream, pieces.begins[chosen], lengths)
    for (tokens, predicted), r, begin in zip(content, row.tolist(), at.tolist(), strict=True):
        end = begin + len(tokens)
        ids[r, begin:end], filled[r, begin:end], positions[r, begin:end] = tokens, 1, np.arange(len(tokens))
        # What begins a document is predicted from the one before it, if that is seen.
        first = 1 if begin == 0 or document_mask else 0
        labels[r, begin + first - 1 : end - 1] = np.where(predicted, tokens, IGNORED)[first:]
    if document_mask:  # padding begins anew with each of its tokens, and so is seen by none
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {"input_ids": ids, "labels": labels, "attention_mask": filled}


def read_pieces(stream: TokenStream, begins: np.ndarray, lengths: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens of each piece, int64, and which of them are predicted; with a read for each power of two of lengths."""
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int64), np.empty(0, bool))] * len(begins)
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    for power in np.unique(powers).tolist():
        numbers = np.flatnonzero(powers == power)
        length = int(lengths[numbers].max())
        starts = np.minimum(begins[numbers], len(stream) - length)
        ids = stream.read(starts, length).astype(np.int64)
        predicted = stream.predicted(starts, length) if stream.masked else np.ones(ids.shape, bool)
        for i, number in enumerate(numbers.tolist()):
            first = int(begins[number] - starts[i])
            part = slice(first, first + int(lengths[number]))
            found[number] = ids[i, part], predicted[i, part]
    return found
