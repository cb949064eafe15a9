"""Parts of tensors from the ranks that have them to those that need them, over any two layouts.

No rank sees the boxes of all others: tensor number t is looked after by rank t mod N, which is told who has and who
needs which box of it, and tells them who sends what to whom. So a rank handles some rows of numbers for each of its own
parts, whatever N is, and for its share of the tensors; the bytes go straight from one to the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod

import torch

from areal_ray.checkpoint.memory.parts import Part
from areal_ray.distributed.device import Uploads
from areal_ray.distributed.point_to_point import PointToPoint

_PIECE_BYTES = 8 << 20  # sent at a time: a rank needs so much memory twice, beyond its own parts
_HAS, _NEEDS, _SEND, _RECEIVE = range(4)  # what a row is about
_Rows = dict[int, list[list[int]]]  # by the rank that they are for


@dataclass(frozen=True, order=True)
class _Transfer:
    """A box of a tensor that goes from one rank to another; both ends sort theirs alike."""

    peer: int
    tensor: int
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    slot: int = 0  # which of its offers the sender takes it from


class Reshard:
    """Fills this rank's parts from those that all ranks offer. A collective.

    Args:
        link: all ranks.
        needed: this rank's parts.
    """

    def __init__(self, link: PointToPoint, needed: Sequence[Part]) -> None:
        self._link, self._needed = link, {part.name: part for part in needed}
        self._numbers = {name: number for number, name in enumerate(sorted(self._needed))}  # the same on all ranks
        self._names = sorted(self._needed)
        self._dims = max((len(part.shape) for part in needed), default=0)

    def run(self, targets: Mapping[str, torch.Tensor], offers: Sequence[tuple[Part, torch.Tensor]]) -> None:
        """Copy.

        Args:
            targets: this rank's parts of its tensors, on any device.
            offers: what it has of them, on the CPU. The offers of all ranks hold every element; two that overlap are
                copies of the same box.
        """
        sends, receives = self._plan(offers)
        uploads, me, size = Uploads(), self._link.rank, self._link.size

        def source(box: _Transfer) -> torch.Tensor:
            part, tensor = offers[box.slot]
            return tensor[_within(box, part.offsets)]

        def target(box: _Transfer) -> torch.Tensor:
            name = self._names[box.tensor]
            return targets[name][_within(box, self._needed[name].offsets)]

        for own, kept in zip(receives[me], sends[me], strict=True):
            uploads.copy(target(own), source(kept))
        for distance in range(1, size):  # each rank has one to send to and one to receive from at a time
            to, origin = (me + distance) % size, (me - distance) % size
            out, into = map(source, sends[to]), map(target, receives[origin])
            for piece, place in zip_longest(_pieces(out), _pieces(into)):
                outgoing = [] if piece is None else [(to, _bytes(piece.contiguous()))]
                buffer = None if place is None else torch.empty(place.shape, dtype=place.dtype)
                self._link.exchange(outgoing, [] if buffer is None else [(origin, _bytes(buffer))])
                if place is not None and buffer is not None:
                    uploads.copy(place, buffer)
        uploads.wait()

    def _plan(
        self, offers: Sequence[tuple[Part, torch.Tensor]]
    ) -> tuple[dict[int, list[_Transfer]], dict[int, list[_Transfer]]]:
        """What this rank sends to and receives from each rank, in order; empty for those with which it has nothing."""
        size = self._link.size
        rows: _Rows = defaultdict(list)
        told = [(_HAS, slot, part) for slot, (part, _) in enumerate(offers)]
        told += [(_NEEDS, 0, part) for part in self._needed.values()]
        for kind, slot, part in told:
            if not part.is_empty:
                number = self._numbers[part.name]
                rows[number % size].append(self._row(kind, number, self._link.rank, slot, part.offsets, part.lengths))
        answers: _Rows = defaultdict(list)
        for number, (has, needs) in self._by_tensor(self._swap(rows)).items():
            for need in needs:
                self._match(number, has, need, answers)
        ends: dict[int, dict[int, list[_Transfer]]] = {_SEND: defaultdict(list), _RECEIVE: defaultdict(list)}
        for row in self._swap(answers):
            kind, number, peer, slot, *box = row
            dims = len(self._needed[self._names[number]].shape)
            lengths = box[self._dims : self._dims + dims]
            ends[kind][peer].append(_Transfer(peer, number, tuple(box[:dims]), tuple(lengths), slot))
        for transfers in (*ends[_SEND].values(), *ends[_RECEIVE].values()):
            transfers.sort()
        return ends[_SEND], ends[_RECEIVE]

    def _swap(self, rows: _Rows) -> list[list[int]]:
        width = 4 + 2 * self._dims
        outgoing = [
            torch.tensor(rows.get(rank, []), dtype=torch.int64).view(-1, width) for rank in range(self._link.size)
        ]
        return [row for came in self._link.all_to_all(outgoing) for row in came.tolist()]

    def _row(
        self, kind: int, number: int, rank: int, slot: int, offsets: Sequence[int], lengths: Sequence[int]
    ) -> list[int]:
        rest = self._dims - len(offsets)  # dimensions that the tensor does not have
        return [kind, number, rank, slot, *offsets, *[0] * rest, *lengths, *[1] * rest]

    def _by_tensor(self, rows: list[list[int]]) -> dict[int, tuple[_Offers, list[list[int]]]]:
        """What was told to this rank of the tensors that it looks after."""
        has: dict[int, list[list[int]]] = defaultdict(list)
        needs: dict[int, list[list[int]]] = defaultdict(list)
        for row in rows:
            (has if row[0] == _HAS else needs)[row[1]].append(row)
        return {number: (_Offers(has[number], self._dims), needs[number]) for number in needs}

    def _match(self, number: int, offers: _Offers, need: list[int], answers: _Rows) -> None:
        """Tell both ends of each box that one rank needs of a tensor."""
        rank, box = need[2], need[4:]
        covered = 0
        for (holder, slot), offsets, lengths in offers.overlapping(rank, box[: self._dims], box[self._dims :]):
            covered += prod(lengths)
            answers[holder].append(self._row(_SEND, number, rank, slot, offsets, lengths))
            answers[rank].append(self._row(_RECEIVE, number, holder, 0, offsets, lengths))
        assert covered == prod(box[self._dims :]), f"{self._names[number]}: {covered} elements of {box} are left"


class _Offers:
    """The boxes of one tensor that ranks have: each once, with all that have it."""

    def __init__(self, rows: list[list[int]], dims: int) -> None:
        holders: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for _, _, rank, slot, *box in rows:
            holders[tuple(box)].append((rank, slot))
        self._holders = list(holders.values())
        boxes = torch.tensor(list(holders), dtype=torch.int64).view(len(holders), 2, dims)
        self._begin, self._end = boxes[:, 0], boxes[:, 0] + boxes[:, 1]

    def overlapping(
        self, rank: int, offsets: Sequence[int], lengths: Sequence[int]
    ) -> Iterator[tuple[tuple[int, int], list[int], list[int]]]:
        """What a rank takes for its box: from whom (itself, if it has it), offsets and lengths."""
        wanted = torch.tensor([offsets, lengths], dtype=torch.int64)
        begin, end = self._begin.maximum(wanted[0]), self._end.minimum(wanted.sum(0))
        for at in (end > begin).all(1).nonzero().flatten().tolist():
            holders = self._holders[at]
            own = [each for each in holders if each[0] == rank]
            yield (own or holders)[rank % len(own or holders)], begin[at].tolist(), (end[at] - begin[at]).tolist()


def _within(transfer: _Transfer, offsets: Sequence[int]) -> tuple[slice, ...]:
    """Where a box lies in a part that begins at these offsets."""
    starts = [at - begin for at, begin in zip(transfer.offsets, offsets, strict=True)]
    return tuple(slice(start, start + length) for start, length in zip(starts, transfer.lengths, strict=True))


def _pieces(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Views of some rows each: one row is sent in one piece, however long."""
    for tensor in tensors:
        row = tensor.nbytes // len(tensor) if tensor.dim() else 0
        yield from tensor.split(max(1, _PIECE_BYTES // row)) if row else (tensor,)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
