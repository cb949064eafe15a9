"""Moments of a save or a deletion at which a rank is killed, and what it writes until then."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from areal_ray.processes.dcp_pickle import MetadataParts
from areal_ray.processes.file_writer import FileWriter, Record, sums_name
from areal_ray.storage import LocalStorage, Sink, Storage

MANIFEST, SHARDS = "manifest.json", ("shard-00000.distcp", "shard-00001.distcp")
SUMS = tuple(map(sums_name, SHARDS))


@dataclass(frozen=True)
class Stage:
    """Where an attempt is cut off.

    Args:
        moment: in the save, as `Trap` names it.
        left: files of that save which are there then; None if it is not certain, or there is no directory.
        rank: which is killed.
        waiting: where another rank stands still, so that it is certain how far it came.
        first: in the first save of the attempt, not in the second.
    """

    moment: str
    left: set[str] | None
    rank: int = 0
    waiting: str = ""
    first: bool = False

    @property
    def committed(self) -> bool:
        return self.left is not None and MANIFEST in self.left

    def __str__(self) -> str:
        return f"rank {self.rank} {self.moment}{', the first save' if self.first else ''}"


class Notes:
    """What the ranks of all attempts tell the test, some of them just before they die."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, what: str, **fields: Any) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps({"what": what, **fields}) + "\n")

    def of(self, what: str) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        lines = [json.loads(line) for line in self._path.read_text().splitlines()]
        return [line for line in lines if line["what"] == what]


class Trap:
    """Kills this process, or has it wait to be killed, at one moment once it is set."""

    def __init__(self, stage: Stage | None, notes: Notes) -> None:
        self._stage, self._notes = stage, notes
        self.set = False
        self.sizes: dict[str, int] = {}  # of what was written before

    def at(self, moment: str) -> None:
        if not self.set or self._stage is None:
            return
        if (moment, dist.get_rank()) == (self._stage.moment, self._stage.rank):
            self._notes.add("dies", stage=str(self._stage))
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == self._stage.waiting:
            threading.Event().wait()


class HalfSink:
    """Writes to a file as far as half of what it was the last time, where the trap is."""

    def __init__(self, file: Any, name: str, trap: Trap) -> None:
        self._file, self._name, self._trap, self._written = file, name, trap, 0

    def write(self, data: bytes | memoryview, /) -> int:
        half = self._trap.sizes.get(self._name, 0) // 2
        if self._written <= half < self._written + len(data):
            self._file.write(data[: half - self._written])
            self._file.flush()
            self._trap.at(f"in {self._name}")
            data = data[half - self._written :]
            self._written = half
        self._written += len(data)
        return int(self._file.write(data))


class TrappedStorage(LocalStorage):
    """A directory in which every step that a save or a deletion makes is a moment for the trap."""

    def __init__(self, path: str, trap: Trap) -> None:
        super().__init__(path)
        self._trap = trap

    def __reduce__(self) -> tuple[type[LocalStorage], tuple[str]]:
        return LocalStorage, (self.location,)  # the trap is for the rank, not for the process that writes beside it

    def sub(self, name: str) -> TrappedStorage:
        return TrappedStorage(super().sub(name).location, self._trap)

    def make(self) -> None:
        super().make()
        self._trap.at("directory made")

    @contextmanager
    def create(self, name: str) -> Iterator[Sink]:
        self._trap.at(f"before {name}")
        with super().create(name) as file:
            yield HalfSink(file, name, self._trap)
        self._trap.sizes[name] = self.size(name) or 0
        self._trap.at(f"after {name}")

    def publish(self, name: str, data: bytes) -> None:
        self._trap.at(f"before {name}")
        super().publish(name, data)
        self._trap.at(f"after {name}")

    def remove(self, name: str) -> None:
        super().remove(name)
        if name == MANIFEST:
            self._trap.at("an older manifest gone")

    def delete(self) -> None:
        if SHARDS[0] in self.names():
            os.remove(Path(self.location, SHARDS[0]))
        self._trap.at("an older shard gone")
        super().delete()


class TrappedFileWriter(FileWriter):
    """The same moments for a shard that a process beside the rank writes; half of it is half of its tensors."""

    trap: Trap

    def write(
        self, directory: Storage, name: str, memory: str, size: int, chunks: Sequence[tuple[int, int]]
    ) -> dict[str, Record]:
        self.trap.at(f"before {name}")
        if self.trap.set and self.trap._stage is not None and self.trap._stage.moment == f"in {name}":
            super().write(directory, name, memory, size, chunks[: len(chunks) // 2])
            directory.remove(sums_name(name))
            self.trap.at(f"in {name}")
        record = super().write(directory, name, memory, size, chunks)
        self.trap.at(f"after {name}")
        return record

    def write_metadata(self, directory: Storage, name: str, parts: MetadataParts) -> Record:
        self.trap.at(f"before {name}")
        record = super().write_metadata(directory, name, parts)
        self.trap.at(f"after {name}")
        return record


def trap_the_manifest(trap: Trap) -> None:
    """Let half of its bytes, wherever they are written to, be all that has reached the disk."""
    fsync = os.fsync

    def cut_off(fd: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{fd}")).name.startswith(MANIFEST) and trap.set:
            whole = os.fstat(fd).st_size
            if trap._stage is not None and trap._stage.moment == f"in {MANIFEST}":
                os.ftruncate(fd, whole // 2)
            trap.at(f"in {MANIFEST}")
        fsync(fd)

    os.fsync = cut_off
