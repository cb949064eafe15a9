"""Copies in memory over the life of a run: going back, coming to an end, and no room for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from areal_ray.checkpoint import Catalog, SyncWriter
from areal_ray.checkpoint.format.shard_file import ShardImage
from areal_ray.checkpoint.memory import copies as memory_copies
from areal_ray.checkpoint.memory import kept_images
from areal_ray.distributed import RankError
from areal_ray.processes.memory_keeper import read_record
from areal_ray.storage import LocalStorage
from areal_ray.train.recovery import RecoverHandler, SavePolicy
from tests.distributed.memory_attempts import INFO, LET_GO, Attempt, after, die, let_go_and_die, to_be_killed
from tests.distributed.ranks import RankFailed, run_ranks

pytestmark = pytest.mark.distributed


def forgets(rank: int, name: str, parent: int, ends: bool) -> None:
    attempt = Attempt(name, parent)
    attempt.step()
    attempt.step()
    let_go_and_die(attempt, ends)


@pytest.mark.parametrize("ends", LET_GO.values(), ids=LET_GO)
def test_nothing_comes_back_when(name: str, ends: bool) -> None:
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(forgets, 2, name, os.getpid(), ends)
    assert [found["copy"] for found in run_ranks(after, 2, name, os.getpid())] == [None] * 2


def files_of(attempt: Attempt) -> set[int]:
    """Inode numbers of the memory of an attempt's copies."""
    return {os.fstat(image.fd).st_ino for image in attempt.copies._kept.images}


def leaves_files(rank: int, name: str, parent: int, folder: str) -> None:
    attempt = Attempt(name, parent)
    attempt.step()
    attempt.copies._last.result()  # type: ignore[union-attr]
    Path(folder, f"{rank}").write_text(repr(files_of(attempt)))
    dist.barrier()
    if rank == 1:
        die()
    to_be_killed()


def takes_over(rank: int, name: str, parent: int, restores: bool) -> dict[str, Any]:
    attempt = Attempt(name, parent)
    copy = attempt.restore()["copy"] if restores else None
    held = [read_record(file, os.fstat(file).st_size) for file in attempt.copies._claimed.files]
    attempt.step()
    attempt.copies._last.result()  # type: ignore[union-attr]
    records = [read_record(image.fd, image.size) for image in attempt.copies._kept.images]
    versions = [record["version"] for record in records if record]
    return {"copy": copy and copy[0], "held": held, "files": files_of(attempt), "versions": versions}


@pytest.mark.parametrize("restores", [True, False], ids=["restored", "not asked for"])
def test_the_memory_of_the_attempt_before_is_used_again_without_its_copies(
    name: str, tmp_path: Path, restores: bool
) -> None:
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(leaves_files, 2, name, os.getpid(), str(tmp_path))
    for rank, found in enumerate(run_ranks(takes_over, 2, name, os.getpid(), restores)):
        assert repr(found["files"]) == (tmp_path / f"{rank}").read_text()
        assert found["copy"] == ((1, 1) if restores else None)
        assert found["held"] == ([None, None] if restores else [])  # before the first copy of its own there is none
        assert found["versions"] == [[1, 2 if restores else 1]]


def goes_back_and_on(rank: int, name: str, parent: int) -> dict[str, Any]:
    attempt = Attempt(name, parent)
    attempt.step()
    attempt.copies.forget()
    attempt.step()
    attempt.step()
    attempt.copies._last.result()  # type: ignore[union-attr]
    return {"sizes": [os.fstat(image.fd).st_size for image in attempt.copies._kept.images]}


def test_after_going_back_copies_are_taken_as_before(name: str) -> None:
    for found in run_ranks(goes_back_and_on, 2, name, os.getpid()):
        assert len(set(found["sizes"])) == 1  # both have a record
    assert [each["step"] for each in run_ranks(after, 2, name, os.getpid())] == [3] * 2


def without_room(rank: int, name: str, parent: int, what: str) -> tuple[list[str], list[int]]:
    """How many copies there are after each of some steps, with room on both ranks from the third on."""

    def free() -> tuple[float, float]:
        size = 2 * sum(tensor.nbytes for tensor in attempt.numbers.mine())
        return 1e6 + 1.5 * size, 1e7  # for one rank there would be

    class NoImage(ShardImage):
        def __init__(self, *_: Any, **__: Any) -> None:
            raise OSError("too many open files")

    attempt, room, image = Attempt(name, parent, retry_after=1), memory_copies.free_memory, kept_images.ShardImage
    if rank == 1 and what == "memory":
        memory_copies.free_memory = free  # type: ignore[assignment]
    if rank == 1 and what == "files":
        kept_images.ShardImage = NoImage  # type: ignore[assignment,misc]
    counts = []
    for step in range(1, 5):
        if step == 3:
            memory_copies.free_memory, kept_images.ShardImage = room, image  # type: ignore[misc]
        attempt.step()
        counts.append(len(attempt.copies._kept.images))
    attempt.copies._last.result()  # type: ignore[union-attr]
    return attempt.said, counts


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("memory", "they need 0.0 GB beside each of 2 ranks, and 0.0 GB are free on this node"),
        ("files", "too many open files"),
    ],
)
def test_without_room_on_one_rank_there_are_no_copies_for_a_while(name: str, what: str, why: str) -> None:
    (quiet, counts), (said, also) = run_ranks(without_room, 2, name, os.getpid(), what)
    assert counts == also == [0, 0, 2, 2]
    assert (quiet, said) == ([], [f"no copies in memory for now: {why}"])
    assert [each["step"] for each in run_ranks(after, 2, name, os.getpid())] == [4] * 2


def grows(rank: int, name: str, parent: int) -> int:
    """Memory is made ahead, on rank 1 there is no room for it, and the state is another one with the first step."""
    attempt = Attempt(name, parent, retry_after=0)
    room = memory_copies.free_memory
    if rank == 1:
        memory_copies.free_memory = lambda: (0, 1)
    attempt.copies.prepare(attempt.state)
    attempt.copies._laid_out.exception()  # type: ignore[union-attr]
    memory_copies.free_memory = room
    attempt.numbers._tensors["moment"] = torch.zeros(5)
    attempt.step()
    attempt.copies._last.result()  # type: ignore[union-attr]
    return len(attempt.copies._kept.images)


def test_ranks_with_and_without_room_begin_anew_together(name: str) -> None:
    assert run_ranks(grows, 2, name, os.getpid(), time_limit_s=60) == [2, 2]


class Quiet:
    """A Journal: nobody hears it."""

    def begins(self, checkpoint: str, step: int) -> None: ...

    def saved(self, *_: Any) -> None: ...

    def skipped(self, step: int) -> None: ...

    def passed_over(self, checkpoint: str, reason: str) -> None: ...


def recovers(rank: int, name: str, parent: int, root: str, number: int) -> dict[str, Any]:
    """A run with both, checkpoints and copies: what is there after each of its moves."""
    attempt, catalog = Attempt(name, parent), Catalog(LocalStorage(root))
    saves, policy = SyncWriter(attempt.ranks), SavePolicy()
    recover = RecoverHandler(
        catalog, attempt.state, saves, Quiet(), number, INFO, attempt.ranks, policy, attempt.copies
    )
    if number == 2:
        copy = recover.restore_from_memory()
        return {"restored from memory": copy and copy.version}

    def copies() -> list[int]:
        if attempt.copies._last is not None:
            attempt.copies._last.result()
        records = [read_record(image.fd, image.size) for image in attempt.copies._kept.images]
        return sorted(record["version"][1] for record in records if record)

    seen: dict[str, Any] = {"nothing to go back to": recover.load()}
    attempt.numbers.train()
    recover.save_to_memory(1)
    seen["one"] = copies()
    seen["kept, as nothing was loaded"] = recover.load(), copies()
    attempt.numbers.train()
    recover.save(2, {})
    attempt.numbers.train()
    recover.save_to_memory(3)
    seen["two"] = copies()
    seen["gone with going back"] = recover.load(), attempt.numbers.step, copies()
    attempt.numbers.train()
    recover.save_to_memory(3)
    seen["anew"] = copies()
    recover._catalog = Catalog(LocalStorage(f"{root}/file"))
    recover.save(4, {})
    with pytest.raises(RankError):
        recover.finish()
    seen["still, as the last save has failed"] = copies()
    return seen


def test_copies_stay_as_long_as_they_are_good_for_something(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    for seen in run_ranks(recovers, 2, name, os.getpid(), str(tmp_path / "run"), 1):
        assert seen == {
            "nothing to go back to": None,
            "one": [1],
            "kept, as nothing was loaded": (None, [1]),
            "two": [1, 3],
            "gone with going back": ("step-00000002.a1", 2, []),
            "anew": [3],
            "still, as the last save has failed": [3],
        }
    for seen in run_ranks(recovers, 2, name, os.getpid(), str(tmp_path / "run"), 2):
        assert seen["restored from memory"] == (1, 3)
