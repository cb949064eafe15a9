"""The catalog of a run's checkpoints: names, order, the newest good one, and an index of all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from areal_ray.checkpoint.format.manifest import (
    MANIFEST,
    CheckpointDamaged,
    CheckpointUnreadable,
    Manifest,
    check_info,
    check_sizes,
    read_manifest,
    reading,
)
from areal_ray.storage import Storage, is_unreadable, read_ahead

INDEX = "checkpoints.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})\.a(\d+)")
# Files of a save, finished or not, with those that a reader and a killed writer may leave beside them.
_OWN = re.compile(
    r"(shard-\d+\.(distcp|sums)|layout\.json|state\.json|\.metadata|manifest\.json|\.reading-[0-9a-f]+)(\.\d+\.tmp)?"
)
_INFO = ("step", "attempt", "time", "world_size", "metrics")  # of a manifest's, what the index has


@dataclass(frozen=True)
class Entry:
    """A directory with a checkpoint's name.

    Args:
        name, step, attempt: as the directory's name says.
        manifest: None if it cannot be used, and `problem` says why.
        committed: whether its save was finished once, good or not by now; also if that cannot be told.
        unreadable: whether the problem is one that may pass, see `CheckpointUnreadable`.
    """

    name: str
    step: int
    attempt: int
    manifest: Manifest | None
    problem: str | None = None
    committed: bool = True
    unreadable: bool = False

    @property
    def info(self) -> Mapping[str, Any]:
        return self.manifest.info if self.manifest else {}


@dataclass(frozen=True)
class Summary:
    """The little that lists and retention need of a checkpoint: a row of the index, or made from a manifest.

    Args:
        name, step, attempt, problem: as for Entry.
        info: step, attempt, time, world size and metrics of the save.
        size: bytes of all files.
        stamp: of the directory when it was looked at, see `Storage.stamp`.
        indexed: whether it is a row of the index, and nothing else was looked at.
    """

    name: str
    step: int
    attempt: int
    info: Mapping[str, Any]
    size: int | None
    stamp: int | None
    problem: str | None = None
    indexed: bool = False

    @cached_property
    def row(self) -> str:
        return json.dumps({"info": self.info, "bytes": self.size, "stamp": self.stamp})


class Catalog:
    """The checkpoints in a run directory. Looks at the storage each time: other processes write there.

    Args:
        run: the run directory.
    """

    def __init__(self, run: Storage) -> None:
        self._run = run

    @staticmethod
    def name(step: int, attempt: int) -> str:
        """step-00000100.a2: every save of every attempt has a name of its own."""
        return f"step-{step:08d}.a{attempt}"

    @staticmethod
    def version(name: str) -> tuple[int, int]:
        """(attempt, step) of a checkpoint's name, by which checkpoints are ordered."""
        match = _NAME.fullmatch(name)
        assert match, name
        return int(match[2]), int(match[1])

    def directory(self, name: str) -> Storage:
        return self._run.sub(name)

    def names(self) -> list[tuple[int, int, str]]:
        """(attempt, step, name) of every directory with a checkpoint's name, newest first.

        An attempt goes on from what it restored, so what it saved is newer than anything that an earlier one left,
        whatever the step.
        """
        matches = (_NAME.fullmatch(name) for name in self._run.directories("step-"))
        return sorted(((int(match[2]), int(match[1]), match[0]) for match in matches if match), reverse=True)

    def last_attempt(self) -> int:
        """The highest attempt that has saved, or begun to; 0 if none has."""
        return max((attempt for attempt, _, _ in self.names()), default=0)

    def last_committed(self) -> str | None:
        """The newest one whose save was finished, good or not by now; None if none ever was."""
        return next((name for *_, name in self.names() if self.is_committed(name)), None)

    def is_committed(self, name: str) -> bool:
        """Whether a save was finished once. What cannot be looked at counts as finished: nobody may delete it.

        Raises:
            OSError: if the storage is away.
        """
        try:
            directory = self.directory(name)
            # Something else in its place, a directory perhaps: then it is not known.
            return directory.size(MANIFEST) is not None or (self._run.can_append and MANIFEST in directory.names())
        except OSError as error:
            if not is_unreadable(error):
                raise
            return True

    def unfinished(self, before_attempt: int) -> list[str]:
        """Directories of earlier attempts that an unfinished save has left: nobody will finish them."""
        return [name for name, own in self.uncommitted(before_attempt).items() if own]

    def is_of_a_save(self, name: str) -> bool:
        """Whether a directory holds nothing but files that saves write; else it is another program's."""
        return all(_OWN.fullmatch(file) for file in self.directory(name).names())

    def uncommitted(self, before_attempt: int) -> dict[str, bool]:
        """Directories of earlier attempts without a manifest, by name, and whether each is `is_of_a_save`.

        Asks for the manifest of those that the index does not have.
        """
        rows = self._rows()
        return {
            name: self.is_of_a_save(name)
            for attempt, _, name in self.names()
            if attempt < before_attempt and self._current(rows, name) is None and not self.is_committed(name)
        }

    def entry(self, name: str) -> Entry:
        """A directory with its manifest and sizes checked; contents are not read."""
        attempt, step = self.version(name)
        try:
            with reading("the directory"):
                directory = self.directory(name)
            manifest = read_manifest(directory)
            check_sizes(directory, manifest)
            if (manifest.info.get("step"), manifest.info.get("attempt")) != (step, attempt):
                raise CheckpointDamaged("manifest.json: belongs to another checkpoint")
            return Entry(name, step, attempt, manifest)
        except CheckpointDamaged as error:
            committed, unreadable = self.is_committed(name), isinstance(error, CheckpointUnreadable)
            return Entry(name, step, attempt, None, str(error), committed, unreadable)

    def entries(self) -> Iterator[Entry]:
        """Every directory, newest first, as `entry` says; looked at when it is its turn."""
        for *_, name in self.names():
            yield self.entry(name)

    def newest(self) -> Entry | None:
        """The newest one that is committed and complete."""
        return next((entry for entry in self.entries() if entry.problem is None), None)

    def committed(self, name: str, manifest: Manifest) -> Summary:
        """The summary of a checkpoint that was committed just now."""
        return self._summary(Entry(name, *self.version(name)[::-1], manifest), self._run.stamp(name))

    def look(self, name: str) -> Summary:
        """The summary of a directory, from its manifest and sizes."""
        stamp = self._run.stamp(name)  # before: what changes meanwhile is looked at again
        return self._summary(self.entry(name), stamp)

    @staticmethod
    def _summary(entry: Entry, stamp: int | None) -> Summary:
        info = {key: entry.info[key] for key in _INFO if key in entry.info}
        size = entry.manifest.total_bytes if entry.manifest else None
        return Summary(entry.name, entry.step, entry.attempt, info, size, stamp, entry.problem)

    def summaries(self, at_most: int | None = None) -> list[Summary]:
        """Every directory, newest first: one listing, one file, and `entry` of those that the index does not have.

        What the index says was so when it was written. On a file system it does not count for a directory that has
        changed since; on object storage, which does not say, one whose files were deleted by hand still looks good, and
        is to be asked for with `entry` before anything depends on it.

        Args:
            at_most: so many that the index does not have, the newest, are looked at; the others are left out.
        """
        rows = self._rows()
        known = {name: self._current(rows, name) for *_, name in self.names()}
        unknown = [name for name, row in known.items() if row is None][:at_most]
        known |= {each.name: each for each in read_ahead((0, partial(self.look, name)) for name in unknown)}
        return [each for each in known.values() if each is not None]

    def write_index(self, summaries: Iterable[Summary]) -> None:
        """Make these the index, but for those with a problem (OSError).

        Nothing depends on it: a checkpoint is one by its manifest, and what is missing here is read from there. It
        takes about 200 bytes for each.
        """
        rows = ",\n".join(f'"{each.name}": {each.row}' for each in summaries if each.problem is None)
        self._run.replace(INDEX, f'{{"format": {_FORMAT}, "checkpoints": {{\n{rows}\n}}}}\n'.encode())

    def _rows(self) -> dict[str, Summary]:
        """The index; empty if there is none that can be read, or it is torn or of another version."""
        try:
            found = json.loads(self._run.read(INDEX))
            if found["format"] != _FORMAT:
                return {}
            return {
                name: Summary(
                    name,
                    int(match[1]),
                    int(match[2]),
                    info=check_info(row["info"]),
                    size=int(row["bytes"]),
                    stamp=row["stamp"],
                    indexed=True,
                )
                for name, row in found["checkpoints"].items()
                if (match := _NAME.fullmatch(name))
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return {}

    def _current(self, rows: Mapping[str, Summary], name: str) -> Summary | None:
        """The row of a directory, if it was written for the directory as it is."""
        row = rows.get(name)
        return row if row is not None and row.stamp == self._run.stamp(name) else None
