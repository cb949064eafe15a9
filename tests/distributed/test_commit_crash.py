"""Killed between any two stages of a save: the next attempt finds the newest committed state, whole, and goes on."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from areal_ray import ckpt, cli
from areal_ray.checkpoint import AsyncWriter, Catalog, SyncWriter, writer
from areal_ray.config import Keep
from areal_ray.journal import LedgerJournal
from areal_ray.persist import Persister
from areal_ray.ranks import Ranks
from areal_ray.recover import RecoverHandler, SavePolicy
from areal_ray.rundir import RunDir
from areal_ray.storage import LocalStorage, Sink, Storage
from tests.distributed.ranks import RankFailed, run_ranks

pytestmark = pytest.mark.distributed

MANIFEST, SHARDS = "manifest.json", ("shard-00000.distcp", "shard-00001.distcp")
FILES = {".metadata", MANIFEST, "state.json", *SHARDS}


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


ONE_OF_TWO = Stage(f"after {SHARDS[0]}", {SHARDS[0]}, waiting=f"before {SHARDS[1]}")
STAGES = {
    "at once": [
        Stage("before manifest.json", FILES - {MANIFEST}, first=True),
        Stage("directory made", set(), waiting=f"before {SHARDS[1]}"),
        Stage(f"in {SHARDS[0]}", {SHARDS[0]}, waiting=f"before {SHARDS[1]}"),
        Stage(f"in {SHARDS[1]}", None, rank=1),
        ONE_OF_TWO,
        Stage("before state.json", {*SHARDS}),
        Stage("before .metadata", {*SHARDS, "state.json"}),
        Stage("before manifest.json", FILES - {MANIFEST}),
        Stage("in manifest.json", FILES - {MANIFEST}),
        Stage("after manifest.json", FILES),
        Stage("an older manifest gone", FILES),
        Stage("an older shard gone", FILES),
    ],
    "beside the training": [
        Stage("directory made", set()),
        Stage(f"in {SHARDS[0]}", {SHARDS[0]}, waiting=f"before {SHARDS[1]}"),
        ONE_OF_TWO,
        Stage("before manifest.json", FILES - {MANIFEST}),
        Stage("in manifest.json", FILES - {MANIFEST}),
        Stage("after manifest.json", FILES),
        Stage("an older manifest gone", FILES),
    ],
}


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


class TrappedPersister(Persister):
    """The same moments for a shard that a process beside the rank writes; half of it is half of its tensors."""

    trap: Trap

    def write(
        self, directory: Storage, name: str, memory: str, size: int, chunks: list[tuple[int, int]]
    ) -> dict[str, Any]:
        self.trap.at(f"before {name}")
        if self.trap.set and self.trap._stage is not None and self.trap._stage.moment == f"in {name}":
            super().write(directory, name, memory, size, chunks[: len(chunks) // 2])
            self.trap.at(f"in {name}")
        record = super().write(directory, name, memory, size, chunks)
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


class Numbers:
    """What is trained: sharded tensors, a replicated one and a count, all of them functions of the finished steps."""

    def __init__(self) -> None:
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        self._tensors: dict[str, torch.Tensor] = {
            f"w{i}": distribute_tensor(torch.zeros(50, 20 + i), mesh, [Shard(0)]) for i in range(6)
        }
        self._tensors["plain"] = torch.zeros(7)
        self.step = 0

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
    trap = TrappedPersister.trap = Trap(stage, notes)
    trap_the_manifest(trap)
    run, ranks, numbers = RunDir(TrappedStorage(root, trap)), Ranks(), Numbers()
    catalog = Catalog(run.storage)
    attempt = ranks.on_first(lambda: run.next_attempt(catalog.last_attempt()))
    if rank == 0:
        run.event("attempt", attempt=attempt)
    journal = LedgerJournal(run if rank == 0 else None, attempt, silent, catalog, Keep(last=2))
    writer.Persister = TrappedPersister  # type: ignore[misc]
    saves = AsyncWriter(ranks, Ranks(dist.new_group(backend="gloo"))) if background else SyncWriter(ranks)
    recover = RecoverHandler(catalog, {"numbers": numbers}, saves, journal, attempt, {}, ranks, SavePolicy())
    pids = ranks.gather([os.getpid(), *([saves._persister._child.pid] if isinstance(saves, AsyncWriter) else [])])  # type: ignore[union-attr]
    restored = recover.load()
    bits = numbers.bits()
    if rank == 0:
        if not background:  # there `areal-ray ckpt gc` is to do it
            journal.clean_up()
        left = [name for _, _, name in catalog.names()]
        notes.add("restored", checkpoint=restored, bits=bits, pids=[pid for own in pids for pid in own], left=left)
    for save in range(2):
        numbers.train()
        bits = numbers.bits()
        if rank == 0:
            notes.add("saving", checkpoint=catalog.name(numbers.step, attempt), bits=bits)
        trap.set = save == 1 or (stage is not None and stage.first)
        recover.dump(numbers.step, {})
        recover.settle()
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
            {row["name"]: row["state"] for row in ckpt.listing(self.run)},
            ckpt.check(self.run.sub(newest.name)) if newest else 0,
        )


@pytest.fixture(scope="module", params=STAGES)
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Life:
    return Life(tmp_path_factory.mktemp("life") / "run", request.param == "beside the training")


def killed_at(life: Life, moment: str) -> Cut:
    return [cut for cut in life.cuts if cut.stage.moment == moment][-1]


def test_each_attempt_is_killed_where_it_should_be(life: Life) -> None:
    for cut in life.cuts:
        assert cut.died == [str(cut.stage)]
        if cut.stage.left is not None:
            files = {name for name in cut.directories[cut.saves[-1]] if not name.endswith(".tmp")}
            assert files == cut.stage.left, str(cut.stage)


def test_half_a_shard_and_half_a_manifest_are_there_when_the_rank_is_killed(life: Life) -> None:
    for name in (SHARDS[0], MANIFEST):
        cut = killed_at(life, f"in {name}")
        whole, half = cut.directories[cut.saves[0]], cut.directories[cut.saves[1]]
        (size,) = (size for file, size in half.items() if file.startswith(name))
        assert 0.3 < size / whole[name] < 0.6


def test_what_has_no_manifest_is_no_checkpoint(life: Life) -> None:
    for cut in life.cuts:
        good = {name for name, state in cut.states.items() if state == "good"}
        assert good == {name for name, files in cut.directories.items() if MANIFEST in files}, str(cut.stage)
        assert all("never finished" in state for name, state in cut.states.items() if name not in good)


def test_what_was_committed_is_whole_whenever_the_rank_is_killed(life: Life) -> None:
    for cut in life.cuts:
        assert (cut.verified > 0) == (cut.newest is not None), str(cut.stage)


def test_the_next_attempt_restores_the_newest_that_was_committed(life: Life) -> None:
    restored = {str(cut.stage): note["checkpoint"] for cut, note in zip(life.cuts, life.restored, strict=True)}
    assert restored == {str(cut.stage): cut.newest for cut in life.cuts}


def test_what_was_committed_and_told_to_nobody_is_restored(life: Life) -> None:
    cut = killed_at(life, "after manifest.json")
    assert cut.saves[-1] in [note["checkpoint"] for note in life.restored]


def test_what_is_restored_is_bit_for_bit_what_was_saved(life: Life) -> None:
    found = {note["checkpoint"]: note["bits"] for note in life.restored if note["checkpoint"]}
    assert found == {name: life.bits[name] for name in found}
    assert len(set(found.values())) == len(found) >= len(life.cuts) - 1


def test_the_next_attempt_saves_at_the_same_step_again(life: Life) -> None:
    again = [cut.saves[0] for cut in life.cuts[1:]]
    for cut, name in zip(life.cuts, again, strict=False):
        (step, attempt), (step_again, attempt_again) = cut.saves[-1].split(".a"), name.split(".a")
        assert int(attempt_again) == int(attempt) + 1
        assert (step_again == step) == (not cut.stage.committed), str(cut.stage)


def test_every_step_is_the_same_as_if_nothing_had_been_killed(life: Life) -> None:
    by_step: dict[str, set[str]] = {}
    for name, bits in life.bits.items():
        by_step.setdefault(name.partition(".a")[0], set()).add(bits)
    assert all(len(bits) == 1 for bits in by_step.values())


def test_a_deletion_that_is_cut_off_has_begun_with_the_manifest(life: Life) -> None:
    gone = {"an older manifest gone": {MANIFEST}, "an older shard gone": {MANIFEST, SHARDS[0]}}
    for cut in life.cuts:
        if cut.stage.moment in gone:
            deleted = {name for name, state in cut.states.items() if state != "good" and life.was_good(name)}
            assert [set(cut.directories[name]) for name in deleted] == [FILES - gone[cut.stage.moment]]


def test_the_next_attempt_removes_what_was_cut_off(life: Life) -> None:
    for cut, note in zip(life.cuts, life.restored, strict=True):
        good = {name for name, state in cut.states.items() if state == "good"}
        assert set(note["left"]) == (good if life.cleans_up else set(cut.states)), str(cut.stage)


def test_gc_removes_what_is_left_and_nothing_that_is_good(life: Life, capsys: pytest.CaptureFixture[str]) -> None:
    good = {
        entry.name: ckpt.digest(life.run.sub(entry.name)) for entry in Catalog(life.run).entries() if entry.manifest
    }
    cut_off = {name for _, _, name in Catalog(life.run).names()} - set(good)
    assert len(good) == 2
    assert bool(cut_off) != life.cleans_up
    assert cli.main(["ckpt", "gc", life.run.location, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["deleted"]) == cut_off
    assert {name: ckpt.digest(life.run.sub(name)) for _, _, name in Catalog(life.run).names()} == good


@pytest.fixture(autouse=True)
def _sigpipe() -> Iterator[None]:
    before = signal.getsignal(signal.SIGPIPE)  # changed by `areal-ray ckpt`
    yield
    signal.signal(signal.SIGPIPE, before)


def test_the_other_rank_and_the_processes_that_write_end_too(life: Life) -> None:
    assert all(ended(pid) for note in life.notes.of("restored") for pid in note["pids"])


def ended(pid: int) -> bool:
    """Whether a process comes to its end; one that has lost its parent is given time."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], 30)[0])
    finally:
        os.close(fd)
