"""Saves that fail, and loads of what is damaged or does not fit, are heard of by every rank."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from areal_ray.checkpoint import CheckpointDamaged, read_manifest
from areal_ray.engine import SaveLoadMeta
from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints
from tests.distributed.ranks import run_ranks
from tests.distributed.small import FINE, attempt, differing, disk_full, erase, snapshot, start_engine, train

pytestmark = pytest.mark.distributed


def flip_a_bit(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a bit early in the shard of rank 0": ("shard-00000.distcp", lambda path: flip_a_bit(path, 0.05)),
    "a bit in the middle of the shard of rank 1": ("shard-00001.distcp", lambda path: flip_a_bit(path, 0.5)),
    "the last bits of the shard of rank 1": ("shard-00001.distcp", lambda path: flip_a_bit(path, 1)),
    "a shard cut short": ("shard-00001.distcp", lambda path: os.truncate(path, path.stat().st_size - 100)),
    "no shard of rank 1": ("shard-00001.distcp", Path.unlink),
    "a bit in the layout": ("layout.json", lambda path: flip_a_bit(path, 0.5)),
    "a bit in the checksums": ("shard-00001.sums", lambda path: flip_a_bit(path, 0.5)),
    "a bit in the values": ("state.json", lambda path: flip_a_bit(path, 0.5)),
    "a bit in the manifest": ("manifest.json", lambda path: flip_a_bit(path, 0.5)),
    "no manifest": ("manifest.json", Path.unlink),
}


def fail(rank: int, root: str) -> dict[str, Any]:
    """Saves that one rank alone cannot do, loads of what is damaged or does not fit, and what works in between."""
    engine = start_engine()
    train(engine, seed=0)
    seen: dict[str, Any] = {}
    for victim in (0, 1):
        with disk_full(rank == victim):
            seen[f"full on {victim}"] = attempt(lambda v=victim: engine.save(SaveLoadMeta(f"{root}/full-{v}")))
    seen["fine"] = attempt(lambda: engine.save(SaveLoadMeta(f"{root}/fine")))
    seen["exists"] = attempt(lambda: engine.save(SaveLoadMeta(f"{root}/fine")))
    seen["no parent"] = attempt(lambda: engine.save(SaveLoadMeta(f"{root}/missing/parent")))
    seen["weights"] = attempt(lambda: engine.save(SaveLoadMeta(f"{root}/weights", with_optim=False)))
    saved = snapshot(engine)
    for number, (what, (name, damage)) in enumerate(DAMAGE.items()):
        path = Path(root) / f"damaged-{number}"
        if rank == 0:
            shutil.copytree(f"{root}/fine", path)
            damage(path / name)
        dist.barrier()
        seen[what] = attempt(lambda path=path: engine.load(SaveLoadMeta(str(path))))
    seen["too little"] = attempt(lambda: engine.load(SaveLoadMeta(f"{root}/weights")))
    seen["too much"] = attempt(lambda: engine.load(SaveLoadMeta(f"{root}/fine", with_optim=False)))
    narrow = start_engine("model.config.hidden_size=32")
    before = snapshot(narrow)
    seen["other model"] = attempt(lambda: narrow.load(SaveLoadMeta(f"{root}/fine")))
    seen["changed by other model"] = differing(snapshot(narrow), before)
    erase(engine)
    seen["fine again"] = attempt(lambda: engine.load(SaveLoadMeta(f"{root}/fine")))
    seen["lost"] = differing(snapshot(engine), saved)
    return seen


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("failed")
    return path, run_ranks(fail, 2, str(path))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_cannot_write_is_heard_by_all(failed: tuple[Path, list[dict[str, Any]]], victim: int) -> None:
    path, outcomes = failed
    for seen in outcomes:
        outcome = seen[f"full on {victim}"]
        assert (outcome.error, outcome.ranks) == ("RankError", (victim,))
        assert "OSError: [Errno 27] File too large" in outcome.text
    with pytest.raises(CheckpointDamaged, match="never finished"):
        read_manifest(LocalStorage(path / f"full-{victim}"))


def test_nothing_is_saved_over_anything(failed: tuple[Path, list[dict[str, Any]]]) -> None:
    path, outcomes = failed
    for seen in outcomes:
        assert (seen["exists"].error, seen["exists"].ranks) == ("RankError", (0,))
        assert "FileExistsError" in seen["exists"].text
        assert seen["no parent"] == FINE  # it is made
    assert checkpoints.check(LocalStorage(path / "fine")) > 0


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_and_heard_by_all(failed: tuple[Path, list[dict[str, Any]]], what: str) -> None:
    name, _ = DAMAGE[what]
    for seen in failed[1]:
        assert seen[what].error == "RankError"
        assert f"CheckpointDamaged: {name}: " in seen[what].text
    assert len({seen[what] for seen in failed[1]}) == 1, "all ranks hear the same"


def test_the_rank_that_reads_the_damage_is_named(failed: tuple[Path, list[dict[str, Any]]]) -> None:
    heard = failed[1][0]["a bit in the middle of the shard of rank 1"]
    assert heard.ranks == (1,)
    assert "checksum" in heard.text


def test_a_checkpoint_that_does_not_fit_is_refused_by_all(failed: tuple[Path, list[dict[str, Any]]]) -> None:
    why = {
        "too little": "missing in it: engine.optim.",
        "other model": "engine.model.model.embed_tokens.weight is (264, 64) in it and (264, 32) here",
    }
    for seen in failed[1]:
        for what, text in why.items():
            assert seen[what].error == "ValueError"
            assert text in seen[what].text
        assert seen["changed by other model"] == []
        assert seen["too much"] == FINE  # the weights of a full checkpoint


def test_after_all_these_failures_the_next_save_and_load_work(failed: tuple[Path, list[dict[str, Any]]]) -> None:
    for seen in failed[1]:
        assert [seen[what] for what in ("fine", "weights", "fine again")] == [FINE] * 3
        assert seen["lost"] == []
