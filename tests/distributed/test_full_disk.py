"""A disk that is full, for real: every rank hears of it, what was saved before stays, and with room it goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from areal_ray.checkpoint import AsyncWriter, Catalog, CheckpointWriter, SyncWriter, load
from areal_ray.checkpoint.retention import remove
from areal_ray.distributed import RankError, Ranks
from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints
from tests.distributed.ranks import run_ranks
from tests.distributed.small import differing, erase, snapshot, start_engine, train
from tests.small_disk import SmallDisk, small_disk

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

GOOD, NO_ROOM, LATER = "step-00000001.a1", "step-00000002.a1", "step-00000003.a1"
WRITERS = ("at once", "beside the training")


def fill_up(rank: int, parent: str) -> dict[str, Any]:
    """With each writer: a save, another one for which there is not enough room, and a third when there is again."""
    engine, ranks = start_engine(), Ranks()
    background = AsyncWriter(ranks, Ranks(dist.new_group(backend="gloo")))
    writers: dict[str, CheckpointWriter] = dict(zip(WRITERS, (SyncWriter(ranks), background), strict=True))
    seen = {name: _fill_up(engine, ranks, writer, f"{parent}/{name}") for name, writer in writers.items()}
    background.close()
    return seen


def _fill_up(engine: Any, ranks: Ranks, writer: CheckpointWriter, root: str) -> dict[str, Any]:
    state, catalog = {"engine": engine.state}, Catalog(LocalStorage(root))

    def begin(name: str, step: int) -> Any:
        return writer.begin(catalog.directory(name), state, {"step": step, "attempt": 1})

    seen: dict[str, Any] = {}
    train(engine, seed=0, fence=writer.fence)
    first = snapshot(engine)
    good = begin(GOOD, 1).result(60)
    # Less than what any rank is going to write.
    ranks.on_rank_zero(lambda: SmallDisk(Path(root)).leave(good.total_bytes // 2 // ranks.size))
    train(engine, seed=1, fence=writer.fence)
    error = begin(NO_ROOM, 2).exception(60)
    if isinstance(error, RankError):
        seen["ranks"] = [failed for failed, *_ in error.failures]
        seen["texts"] = [text for _, text, _ in error.failures]
        seen["only the storage"] = error.only(OSError)
    seen["goes on"] = train(engine, seed=2, fence=writer.fence)["loss"] > 0
    third = snapshot(engine)
    newest = ranks.on_rank_zero(catalog.newest)
    seen["newest"] = newest.name if newest else None
    seen["digest"] = ranks.on_rank_zero(lambda: checkpoints.digest(catalog.directory(GOOD)))
    ranks.on_rank_zero(lambda: (remove(catalog, NO_ROOM), SmallDisk(Path(root)).make_room()))
    begin(LATER, 3).result(60)
    for name, right in ((GOOD, first), (LATER, third)):
        erase(engine)
        load(catalog.directory(name), state, ranks)
        seen[name] = differing(snapshot(engine), right)
    return seen


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    parent = tmp_path_factory.mktemp("disks")
    with small_disk(parent / WRITERS[0], megabytes=8), small_disk(parent / WRITERS[1], megabytes=8):
        yield parent


@pytest.fixture(scope="module")
def filled(parent: Path) -> list[dict[str, Any]]:
    return run_ranks(fill_up, 2, str(parent))


@pytest.fixture(params=WRITERS)
def seen(request: pytest.FixtureRequest, filled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each rank."""
    return [rank[request.param] for rank in filled]


def test_every_rank_hears_that_no_rank_had_room(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["ranks"] == [0, 1]
        assert all(os.strerror(errno.ENOSPC) in text for text in rank["texts"])
        assert rank["only the storage"]


def test_the_training_goes_on(seen: list[dict[str, Any]]) -> None:
    assert [rank["goes on"] for rank in seen] == [True, True]


def test_what_was_saved_before_stays_the_newest_bit_for_bit(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert (rank["newest"], rank[GOOD]) == (GOOD, [])


def test_with_room_the_next_save_works(seen: list[dict[str, Any]]) -> None:
    assert [rank[LATER] for rank in seen] == [[], []]


@pytest.mark.parametrize("writer", WRITERS)
def test_both_verify_in_the_end(parent: Path, filled: list[dict[str, Any]], writer: str) -> None:
    good, later = (LocalStorage(parent / writer / name) for name in (GOOD, LATER))
    assert checkpoints.check(good) > 0
    assert checkpoints.check(later) > 0
    assert checkpoints.digest(good) == filled[0][writer]["digest"] != checkpoints.digest(later)
