"""Saves beside the training: what is saved is the state of the moment, and what fails is heard by every rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from areal_ray.checkpoint import AsyncWriter, CheckpointDamaged, load, read_manifest, save
from areal_ray.distributed import Ranks
from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints
from tests.distributed.ranks import run_ranks
from tests.distributed.small import FINE, attempt, differing, disk_full, erase, snapshot, start_engine, train

pytestmark = pytest.mark.distributed


def open_writer() -> AsyncWriter:
    writer = AsyncWriter(Ranks(), Ranks(dist.new_group(backend="gloo")))
    return writer


def save_while_training(rank: int, root: str) -> dict[str, Any]:
    """Two saves, training going on during the first; both and one that was written at once are read back."""
    engine = start_engine()
    state, run = {"engine": engine.state}, LocalStorage(root)
    writer = open_writer()
    train(engine, seed=0)
    first = snapshot(engine)
    save(run.sub("at once"), state, {"step": 1}, Ranks())
    one = writer.begin(run.sub("one"), state, {"step": 1})
    train(engine, seed=1, fence=writer.fence)
    train(engine, seed=2, fence=writer.fence)
    second = snapshot(engine)
    two = writer.begin(run.sub("two"), state, {"step": 3})
    seen: dict[str, Any] = {
        "manifests": [given and dataclasses.asdict(given) for given in (future.result(60) for future in (one, two))],
        "on disk": [dataclasses.asdict(read_manifest(run.sub(name))) for name in ("one", "two")],
        "again": attempt(lambda: writer.begin(run.sub("two"), state, {}).result(60)),
    }
    for name, right in (("one", first), ("two", second), ("at once", first)):
        erase(engine)
        load(run.sub(name), state, Ranks())
        seen[name] = differing(snapshot(engine), right)
    child = writer._file_writer._child
    writer.close()
    seen["child"] = None if child is None else child.poll()
    return seen


def fail_to_save(rank: int, root: str) -> dict[str, Any]:
    """A writer whose process on rank 1 gets no room, then one whose process on rank 0 is killed between saves."""
    engine = start_engine()
    state, run = {"engine": engine.state}, LocalStorage(root)
    with disk_full(rank == 1):
        cramped = open_writer()  # its process is born with the limit
    begun = cramped.begin(run.sub("full"), state, {})
    seen: dict[str, Any] = {
        "stats": train(engine, seed=0, fence=cramped.fence),
        "full": attempt(lambda: begun.result(60)),
    }
    cramped.close()
    writer = open_writer()
    if rank == 0:
        child = writer._file_writer._child
        assert child is not None
        child.kill()
        child.wait()
    seen["after a kill"] = attempt(lambda: writer.begin(run.sub("fine"), state, {}).result(60))
    writer.close()
    return seen


def save_and_fail(rank: int, root: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return save_while_training(rank, root), fail_to_save(rank, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def outcomes(root: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return run_ranks(save_and_fail, 2, str(root))


@pytest.fixture
def saved(outcomes: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    return [saved for saved, _ in outcomes]


@pytest.fixture
def failed(outcomes: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    return [failed for _, failed in outcomes]


def assert_saved_right(seen: dict[str, Any], rank: int = 0) -> None:
    assert seen["manifests"] == (seen["on disk"] if rank == 0 else [None, None])
    assert [manifest["info"] for manifest in seen["on disk"]] == [{"step": 1}, {"step": 3}]
    assert [seen[name] for name in ("one", "two", "at once")] == [[], [], []]


def test_a_save_holds_the_state_of_the_moment_it_began(saved: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(saved):
        assert_saved_right(seen, rank)


def test_it_is_the_same_checkpoint_as_one_written_at_once(root: Path, saved: list[dict[str, Any]]) -> None:
    one, two, at_once = (LocalStorage(root / name) for name in ("one", "two", "at once"))
    assert checkpoints.digest(one) == checkpoints.digest(at_once) != checkpoints.digest(two)
    assert read_manifest(one).files == read_manifest(at_once).files


def test_nothing_is_saved_over_anything(root: Path, saved: list[dict[str, Any]]) -> None:
    for seen in saved:
        assert (seen["again"].error, seen["again"].ranks) == ("RankError", (0,))
        assert "FileExistsError" in seen["again"].text
    assert checkpoints.check(LocalStorage(root / "two")) > 0


def test_the_process_that_writes_ends_with_the_writer(saved: list[dict[str, Any]]) -> None:
    for seen in saved:
        assert seen["child"] == 0


def test_a_rank_that_cannot_write_is_heard_by_all_while_training_goes_on(
    root: Path, failed: list[dict[str, Any]]
) -> None:
    for seen in failed:
        assert (seen["full"].error, seen["full"].ranks) == ("RankError", (1,))
        assert "File too large" in seen["full"].text
        assert seen["stats"] == failed[0]["stats"]
    with pytest.raises(CheckpointDamaged, match="never finished"):
        read_manifest(LocalStorage(root / "full"))


def test_the_process_that_writes_is_started_again_if_it_died(root: Path, failed: list[dict[str, Any]]) -> None:
    assert [seen["after a kill"] for seen in failed] == [FINE, FINE]
    assert checkpoints.check(LocalStorage(root / "fine")) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_saves_while_it_trains(tmp_path: Path) -> None:
    (seen,) = run_ranks(save_while_training, 1, str(tmp_path), gpu=True)
    assert_saved_right(seen)
