"""The catalog of a run's checkpoints: names, order, and the newest good one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from areal_ray.checkpoint.manifest import MANIFEST, CheckpointDamaged, Manifest, check_sizes, read_manifest
from areal_ray.storage import Storage

_NAME = re.compile(r"step-(\d{8,})\.a(\d+)")


@dataclass(frozen=True)
class Entry:
    """A directory with a checkpoint's name.

    Args:
        name, step, attempt: as the directory's name says.
        manifest: None if it cannot be used, and `problem` says why.
        committed: whether its save was finished once, good or not by now.
    """

    name: str
    step: int
    attempt: int
    manifest: Manifest | None
    problem: str | None = None
    committed: bool = True


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
        files = self._run.sizes()
        found = [name for name in self._run.names() if _NAME.fullmatch(name) and name not in files]
        return sorted(((*self.version(name), name) for name in found), reverse=True)

    def last_attempt(self) -> int:
        """The highest attempt that has saved, or begun to; 0 if none has."""
        return max((attempt for attempt, _, _ in self.names()), default=0)

    def last_committed(self) -> str | None:
        """The newest one whose save was finished, good or not by now; None if none ever was."""
        return next((name for *_, name in self.names() if self.directory(name).size(MANIFEST) is not None), None)

    def entries(self) -> Iterator[Entry]:
        """Every directory, newest first, with its manifest and sizes checked; contents are not read."""
        for attempt, step, name in self.names():
            try:
                manifest = read_manifest(self.directory(name))
                check_sizes(self.directory(name), manifest)
                if (manifest.info.get("step"), manifest.info.get("attempt")) != (step, attempt):
                    raise CheckpointDamaged("manifest.json: belongs to another checkpoint")
                yield Entry(name, step, attempt, manifest)
            except CheckpointDamaged as error:
                committed = self.directory(name).size(MANIFEST) is not None
                yield Entry(name, step, attempt, None, str(error), committed)

    def newest(self) -> Entry | None:
        """The newest one that is committed and complete."""
        return next((entry for entry in self.entries() if entry.problem is None), None)
