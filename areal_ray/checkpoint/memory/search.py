"""Search for the newest step of which copies of all parts are left, wherever the ranks of a job run now."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from areal_ray.checkpoint.format.shard_file import ShardImage
from areal_ray.checkpoint.memory.parts import Part, decode, encode, filled_image
from areal_ray.distributed import Ranks
from areal_ray.processes.memory_keeper import find_record

Version = tuple[int, int]  # (attempt, step), by which copies and checkpoints are ordered
_Key = tuple[int, int, int]  # step, rank and number of ranks of the attempt that made a copy
_Choice = tuple[int | None, list[int]]  # the step (None: there is none), which of its copies a rank is to give


@dataclass(frozen=True)
class Copy:
    """A copy that was restored.

    Args:
        version: (attempt, step) at which it was saved.
        values: plain values of the state, by object, as state.json would hold them.
        info: about the run that saved it.
    """

    version: Version
    values: dict[str, Any]
    info: dict[str, Any]


@dataclass(frozen=True)
class Given:
    """One rank's share of a whole set.

    Args:
        copy: that it is.
        images: of the parts that this rank gives.
        parts: what is in each of them.
        in_place: whether each rank gives just what it needs.
    """

    copy: Copy
    images: list[ShardImage]
    parts: list[list[Part]]
    in_place: bool


class Search:
    """Finds the newest whole set among the copies that the ranks hold.

    Rank 0 gathers three numbers for each copy and chooses who gives which; the others learn of their own alone. What
    was chosen is compared with its checksum by who holds it, and if one is damaged, rank 0 chooses again without it.

    Args:
        ranks: all ranks.
        files: of copies that this rank holds.
        run: digest of the run, see `parts.digest`.
        parts: this rank's own.
        attempt: whose copies count.
        anywhere: whether a copy counts that another rank has made, or one of another number of ranks.
        complain: prints a line for the user.
    """

    def __init__(
        self,
        ranks: Ranks,
        files: Sequence[int],
        run: str,
        parts: Sequence[Part],
        attempt: int,
        anywhere: bool,
        complain: Callable[[str], None],
    ) -> None:
        self._ranks, self._attempt, self._complain = ranks, attempt, complain
        self._own = ranks.rank, ranks.size, encode(parts)
        found = [(file, *at_and_record) for file in files if (at_and_record := find_record(file)) is not None]
        self._copies = [
            (file, at, record)
            for file, at, record in found
            if record["version"][0] == attempt and record["run"] == run and (anywhere or self._is_own(record))
        ]

    def newest(self, newer_than: Version | None) -> Given | None:
        """The newest whole set; None if there is none newer than `newer_than`. A collective."""
        keys = self._ranks.gather_to_rank_zero([_key(record) for _, _, record in self._copies])
        damaged: dict[tuple[int, int], str] = {}  # by rank and which of its copies
        while True:
            chosen = None if keys is None else self._choose(keys, damaged, newer_than)
            step, mine = self._ranks.scatter(chosen)
            images = {} if step is None else {at: self._image(at) for at in mine}
            problems = {at: problem for at, image in images.items() if (problem := self._problem(at, image))}
            if self._ranks.all_reduce_min(not problems):
                break
            for rank, told in enumerate(self._ranks.gather_to_rank_zero(problems) or ()):
                damaged |= {(rank, at): f"rank {rank}: {problem}" for at, problem in told.items()}
        if damaged:
            self._complain(f"passing over copies in memory: {'; '.join(damaged.values())}")
        return None if step is None else self._given(step, images)

    def _choose(
        self, keys: Sequence[Sequence[_Key]], damaged: Mapping[tuple[int, int], str], newer_than: Version | None
    ) -> list[_Choice]:
        """For each rank what it is to give. On rank 0: goes over the copies of all ranks, three numbers each."""
        holders: dict[int, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        sizes: dict[int, int] = {}
        for holder, own in enumerate(keys):
            for at, (step, rank, size) in enumerate(own):
                if (holder, at) not in damaged:
                    holders[step][rank].append((holder, at))
                    sizes[step] = size
        whole = [step for step in holders if len(holders[step]) == sizes[step]]
        newest = max(whole, default=None)
        given: list[list[int]] = [[] for _ in keys]
        if newest is None or (newer_than is not None and (self._attempt, newest) <= newer_than):
            return [(None, []) for _ in keys]
        for rank, there in holders[newest].items():
            # Itself, for nothing is to be sent then; else who gives the least so far.
            holder, at = min(there, key=lambda each: (each[0] != rank, len(given[each[0]])))
            given[holder].append(at)
        return [(newest, mine) for mine in given]

    def _given(self, step: int, images: Mapping[int, ShardImage]) -> Given:
        records = [self._copies[at][2] for at in images]
        in_place = len(records) == 1 and self._is_own(records[0])
        told = next(((record["values"], record["info"]) for record in records if record["rank"] == 0), None)
        # By whoever has the part of the rank that was rank 0 then.
        first = self._ranks.broadcast(next(filter(None, self._ranks.gather_to_rank_zero(told) or ()), None))
        assert first is not None  # it is a part of every whole set
        values, info = first
        return Given(
            Copy((self._attempt, step), values, info),
            list(images.values()),
            [decode(record["parts"]) for record in records],
            bool(self._ranks.all_reduce_min(in_place)),
        )

    def _image(self, at: int) -> ShardImage:
        file, _, record = self._copies[at]
        return filled_image(file, decode(record["parts"]))

    def _problem(self, at: int, image: ShardImage) -> str | None:
        _, size, record = self._copies[at]
        if image.size == size and image.digest() == record["sum"]:
            return None
        return f"CheckpointDamaged: the copy in memory of step {record['version'][1]} does not match its checksum"

    def _is_own(self, record: Mapping[str, Any]) -> bool:
        return (record["rank"], record["ranks"], record["parts"]) == self._own


def _key(record: Mapping[str, Any]) -> _Key:
    return record["version"][1], record["rank"], record["ranks"]
