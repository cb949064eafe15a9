"""A run that is killed between any two stages of a save, attempt after attempt, and what it leaves."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from areal_ray.checkpoint import AsyncWriter, Catalog, SyncWriter, writer
from areal_ray.config import KeepConfig
from areal_ray.distributed import Ranks
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints
from areal_ray.train.journal import Journal, retention
from areal_ray.train.recovery import RecoverHandler, SavePolicy
from tests.distributed.ranks import RankFailed, run_ranks
from tests.distributed.traps import (
    MANIFEST,
    SHARDS,
    SUMS,
    Notes,
    Stage,
    Trap,
    TrappedFileWriter,
    TrappedStorage,
    trap_the_manifest,
)

PARTS = {*SHARDS, *SUMS}
FILES = {".metadata", "layout.json", MANIFEST, "state.json", *PARTS}
LATE = [
    Stage("before .metadata", FILES - {MANIFEST, ".metadata"}),
    Stage("before manifest.json", FILES - {MANIFEST}),
    Stage("in manifest.json", FILES - {MANIFEST}),
    Stage("after manifest.json", FILES),
    Stage("an older manifest gone", FILES),
]
STAGES = {
    "at once": [
        Stage("before manifest.json", FILES - {MANIFEST}, first=True),
        Stage("directory made", set(), waiting=f"before {SHARDS[1]}"),
        Stage(f"in {SHARDS[0]}", {SHARDS[0]}, waiting=f"before {SHARDS[1]}"),
        Stage(f"in {SHARDS[1]}", None, rank=1),
        Stage(f"before {SUMS[0]}", {SHARDS[0]}, waiting=f"before {SHARDS[1]}"),
        Stage(f"after {SUMS[0]}", {SHARDS[0], SUMS[0]}, waiting=f"before {SHARDS[1]}"),
        Stage("before state.json", PARTS),
        Stage("before layout.json", {*PARTS, "state.json"}),
        *LATE,
        Stage("an older shard gone", FILES),
    ],
    "beside the training": [
        Stage("directory made", set()),
        Stage(f"in {SHARDS[0]}", {SHARDS[0]}, waiting=f"before {SHARDS[1]}"),
        Stage(f"after {SHARDS[0]}", {SHARDS[0], SUMS[0]}, waiting=f"before {SHARDS[1]}"),
        *LATE,
    ],
}


class Numbers:
    """What is trained: sharded tensors, a replicated one and a count, all of them functions of the finished steps."""

    def __init__(self) -> None:
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        self._tensors: dict[str, torch.Tensor] = {
            f"w{i}": distribute_tensor(torch.zeros(50, 20 + i), mesh, [Shard(0)]) for i in range(6)
        }
        self._tensors["plain"] = torch.zeros(7)
        self.step = 0

    def mine(self) -> list[torch.Tensor]:
        """What this rank has of them."""
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in self._tensors.values()]

    def train(self) -> None:
        self.step += 1
        generator = torch.Generator().manual_seed(self.step)
        for tensor in self._tensors.values():
            change = torch.randn(tensor.shape, generator=generator)
            if isinstance(tensor, DTensor):
                change = distribute_tensor(change, tensor.device_mesh, tensor.placements)
            tensor.mul_(0.9).add_(change)

    def bits(self) -> str:
        """A digest of them, whole. A collective."""
        total = hashlib.sha256(str(self.step).encode())
        for tensor in self._tensors.values():
            total.update((tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy().tobytes())
        return total.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": dict(self._tensors), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def silent(_: str) -> None:
    """What is said to the user."""


def go_on(rank: int, root: str, stage: Stage | None, background: bool) -> None:
    """One attempt as a worker makes it: restore, save twice, older ones let go; cut off at `stage`."""
    dist.init_process_group("gloo")
    notes = Notes(Path(f"{root}.notes"))
    trap = TrappedFileWriter.trap = Trap(stage, notes)
    trap_the_manifest(trap)
    run, ranks, numbers = RunDir(TrappedStorage(root, trap)), Ranks(), Numbers()
    catalog = Catalog(run.storage)
    attempt = ranks.on_rank_zero(lambda: run.next_attempt(catalog.last_attempt()))
    if rank == 0:
        run.event("attempt", attempt=attempt)
    kept = retention(run, attempt, silent, catalog, KeepConfig(last=2))
    journal = Journal(run if rank == 0 else None, attempt, silent, kept)
    writer.FileWriter = TrappedFileWriter  # type: ignore[misc]
    saves = AsyncWriter(ranks, Ranks(dist.new_group(backend="gloo"))) if background else SyncWriter(ranks)
    recover = RecoverHandler(catalog, {"numbers": numbers}, saves, journal, attempt, {}, ranks, SavePolicy())
    pids = ranks.gather([os.getpid(), *([saves._file_writer._child.pid] if isinstance(saves, AsyncWriter) else [])])  # type: ignore[union-attr]
    restored = recover.load()
    bits = numbers.bits()
    if rank == 0:
        if not background:  # there `areal-ray ckpt gc` is to do it
            kept.clean_up(attempt)
        left = [name for _, _, name in catalog.names()]
        notes.add("restored", checkpoint=restored, bits=bits, pids=[pid for own in pids for pid in own], left=left)
    for save in range(2):
        numbers.train()
        bits = numbers.bits()
        if rank == 0:
            notes.add("saving", checkpoint=catalog.name(numbers.step, attempt), bits=bits)
        trap.set = save == 1 or (stage is not None and stage.first)
        recover.save(numbers.step, {})
        recover.wait()
        if isinstance(saves, AsyncWriter):  # older ones are let go by its thread, after `wait` has returned
            saves._thread.submit(lambda: None).result()
    recover.finish()


@dataclass(frozen=True)
class Cut:
    """What an attempt that was cut off has left.

    Args:
        stage: where it was to be cut off.
        died: what the rank said just before.
        saves: names of the saves that were begun; the last is the one that was under way.
        directories: sizes of the files of every directory with a checkpoint's name.
        states: of each of these, as `areal-ray ckpt ls` has it.
        verified: bytes of what is the newest good one now, all of them read.
    """

    stage: Stage
    died: list[str]
    saves: list[str]
    directories: dict[str, dict[str, int]]
    states: dict[str, str]
    verified: int

    @property
    def newest(self) -> str | None:
        """What is to be restored."""
        return [None, *self.saves][-1 if self.stage.committed else -2]


class Life:
    """A run that is killed at one stage after the other, and then is not."""

    def __init__(self, root: Path, background: bool) -> None:
        root.mkdir()
        self.cleans_up = not background
        self.run, self.notes = LocalStorage(root), Notes(Path(f"{root}.notes"))
        self.cuts = []
        for stage in STAGES["beside the training" if background else "at once"]:
            begun = len(self.notes.of("saving"))
            with pytest.raises(RankFailed):
                run_ranks(go_on, 2, str(root), stage, background)
            self.cuts.append(self._cut(stage, [note["checkpoint"] for note in self.notes.of("saving")[begun:]]))
        run_ranks(go_on, 2, str(root), None, background)
        self.bits = {note["checkpoint"]: note["bits"] for note in self.notes.of("saving")}
        self.restored = self.notes.of("restored")[1:]  # after each cut

    def was_good(self, name: str) -> bool:
        """Whether the save of that name was committed."""
        return name not in {cut.saves[-1] for cut in self.cuts if not cut.stage.committed}

    def _cut(self, stage: Stage, saves: list[str]) -> Cut:
        names = [name for _, _, name in Catalog(self.run).names()]
        newest = Catalog(self.run).newest()
        return Cut(
            stage,
            [note["stage"] for note in self.notes.of("dies")[len(self.cuts) :]],
            saves,
            {name: self.run.sub(name).sizes() for name in names},
            {row["name"]: row["state"] for row in checkpoints.listing(self.run)},
            checkpoints.check(self.run.sub(newest.name)) if newest else 0,
        )
