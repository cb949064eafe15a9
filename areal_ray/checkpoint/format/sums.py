"""Tables of checksums, one beside each shard file: `processes.file_writer.write_summed` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from areal_ray.checkpoint.format.layout import Ints
from areal_ray.checkpoint.format.manifest import CheckpointDamaged


@dataclass(frozen=True, eq=False)
class Sums:
    """Rows of a shard file, one for each part in it: where it is and the checksums of its pieces.

    Args:
        offsets, sizes: (rows,): bytes of the part in the file, with what torch.save writes around its data.
        data: (rows,): of these the ones before its data; None in format 1, which does not say.
        piece: bytes that have a checksum of their own, from the beginning of each part on; None: the part as a whole.
        first: (rows,): number of the first piece of each part.
        sums: (pieces,): xxh3_64 of each.
    """

    offsets: Ints
    sizes: Ints
    data: Ints | None
    piece: int | None
    first: Ints
    sums: npt.NDArray[np.uint64]

    @classmethod
    def decode(cls, data: bytes, name: str, size: int, parts: int) -> Sums:
        """The table from the bytes of its file.

        Args:
            data: of the table.
            name: of the table, for messages.
            size: bytes of the shard file.
            parts: in it.

        Raises:
            CheckpointDamaged: if it is none, or is of another file.
        """
        try:
            head, *lines = data.decode("ascii").splitlines()
            kind, version, piece = head.split(" ")
            if (kind, version) != ("sums", "1") or not 0 < int(piece) < 2**40:
                raise ValueError(f"it begins with {head[:40]!r}")
            rows = [line.split(" ") for line in lines]
            sizes = np.array([int(row[0]) for row in rows], np.int64)
            before = np.array([int(row[1]) for row in rows], np.int64)
            counts = np.array([len(row) - 2 for row in rows], np.int64)
            if (
                (before < 0).any()
                or (before > sizes).any()
                or (sizes > size).any()
                or (counts != -(-sizes // int(piece))).any()
            ):
                raise ValueError("a line of a tensor that there is not")
            if (int(sizes.sum()), len(rows)) != (size, parts):
                raise ValueError(f"it is of a file of {len(rows)} parts and {int(sizes.sum())} bytes")
            sums = np.array([int(each, 16) for row in rows for each in row[2:]], np.uint64)
        except (ValueError, IndexError, OverflowError) as error:
            raise CheckpointDamaged(f"{name}: not readable ({type(error).__name__}: {error})") from None
        return cls(np.cumsum(sizes) - sizes, sizes, before, int(piece), np.cumsum(counts) - counts, sums)

    @classmethod
    def of_format_1(cls, rows: Sequence[tuple[int, int, str]]) -> Sums:
        """The table of a file whose parts have one checksum each: (offset, bytes, xxh3_64 in hexadecimal)."""
        offsets, sizes, sums = zip(*rows, strict=True) if rows else ((), (), ())
        return cls(
            np.array(offsets, np.int64),
            np.array(sizes, np.int64),
            None,
            None,
            np.arange(len(rows)),
            np.array([int(digest, 16) for digest in sums], np.uint64),
        )

    def span(self, row: int, start: int, end: int) -> tuple[int, int]:
        """The bytes of the file to be read and verified to have some bytes of a part: where the pieces begin and end.

        Args:
            row: of the part.
            start, end: bytes of the part.
        """
        offset, size = int(self.offsets[row]), int(self.sizes[row])
        if self.piece is None:
            return offset, offset + size
        return offset + start // self.piece * self.piece, offset + min(-(-end // self.piece) * self.piece, size)

    def verify(self, row: int, start: int, content: memoryview, name: str) -> None:
        """Compare pieces of a part with their checksums.

        Args:
            row: of the part.
            start: where in the file the content begins, as `span` said.
            content: the bytes.
            name: of the shard file, for the message.

        Raises:
            CheckpointDamaged: for the first one that differs.
        """
        piece = self.piece or max(1, len(content))
        number = int(self.first[row]) + (start - int(self.offsets[row])) // piece
        for at in range(0, len(content), piece):
            if xxhash.xxh3_64_intdigest(content[at : at + piece]) != int(self.sums[number]):
                raise CheckpointDamaged(f"{name}: the checksum of the bytes at {start + at} does not match")
            number += 1


def shard_name(number: int) -> str:
    """The name of a shard file; nothing on loading depends on which rank wrote it."""
    return f"shard-{number:05d}.distcp"
