"""RecoverHandler on two ranks, over the real engine, data cursor, progress and clocks: a run that is cut goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from areal_ray.distributed import Ranks
from areal_ray.train.cadence import Cadence
from tests.distributed.ranks import run_ranks
from tests.distributed.recover_run import LAST, Run
from tests.distributed.small import GLOBAL_BATCH, differing

pytestmark = pytest.mark.distributed


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    names = [name for name in a if name != "tensors" and a[name] != b[name]]
    return names + differing(a["tensors"], b["tensors"])


def attempt(work: Any) -> str:
    try:
        return str(work())
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def spoil(root: str, name: str, file: str = "shard-00001.distcp") -> None:
    """Flip a bit in a checkpoint, once, with no rank reading yet or writing still."""
    dist.barrier()
    if dist.get_rank() == 0:
        path = Path(root, name, file)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    dist.barrier()


def recover(rank: int, parent: str) -> dict[str, Any]:
    """The life of a run in many attempts. In `parent` there are the directories run, unfinished and cut."""
    root, elsewhere = f"{parent}/run", f"{parent}/unfinished"
    seen: dict[str, Any] = {}
    first = Run(root, attempt=1, background=True)
    seen["nothing yet"] = first.recover.load(), list(first.heard.passed)
    first.train(LAST, save=True)
    seen["undisturbed"], seen["saves"] = first.standing(), first.heard.saves

    # All objects new, as in new processes, and away from the state that is to come back.
    again = Run(root, attempt=2)
    again.train(1)
    seen["restored"] = again.recover.load(), list(again.heard.passed)
    seen["restored progress"] = dataclasses.asdict(again.progress)
    again.train(LAST)
    seen["continued"] = again.standing()

    spoil(root, "step-00000004.a1")
    if rank == 0:
        Path(root, "step-00000005.a2").mkdir()  # a save that was cut before its manifest
    dist.barrier()
    older = Run(root, attempt=3)
    older.train(1)
    seen["fell back"] = older.recover.load(), list(older.heard.passed)
    seen["clock"] = older.save.state_dict()["elapsed_s"]
    older.train(LAST)
    seen["continued from older"] = older.standing()

    other = Run(root, attempt=4, data_seed=1)
    seen["other data"] = attempt(other.recover.load)
    spoil(root, "step-00000002.a1", "layout.json")
    lost = Run(root, attempt=5)
    seen["all damaged"] = attempt(lost.recover.load), [name for name, _ in lost.heard.passed]
    if rank == 0:
        Path(elsewhere, "step-00000002.a1").mkdir()
    dist.barrier()
    unfinished = Run(elsewhere, attempt=2)
    seen["only unfinished"] = unfinished.recover.load(), list(unfinished.heard.passed)

    cut = Run(f"{parent}/cut", attempt=1)
    cut.train(3, save=True)
    # The second rank's clock stands still, then races.
    seen["by the clock"] = [save_by_the_clock([3.0, other][rank]) for other in (0.0, 9.0)]
    return seen


def save_by_the_clock(seconds_per_step: float) -> list[int]:
    """Steps at which a save is due, on a clock of this rank's own."""
    now = 1000.0 * Ranks().rank
    cadence = Cadence(seconds=10, agree=Ranks().agree, clock=lambda: now)
    due = []
    for step in range(1, 13):
        now += seconds_per_step
        if cadence.due(step, epoch=0):
            cadence.fired(step, epoch=0)
            due.append(step)
    return due


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("runs")
    for name in ("run", "unfinished", "cut"):
        (parent / name).mkdir()
    return parent


@pytest.fixture(scope="module")
def recovered(parent: Path) -> list[dict[str, Any]]:
    return run_ranks(recover, 2, str(parent))


def test_a_new_run_has_nothing_to_restore(recovered: list[dict[str, Any]]) -> None:
    for seen in recovered:
        assert seen["nothing yet"] == (None, [])


def test_every_rank_hears_of_every_save(recovered: list[dict[str, Any]]) -> None:
    for seen in recovered:
        assert seen["saves"] == [("step-00000002.a1", True), ("step-00000004.a1", True)]


def test_the_newest_save_is_restored_and_the_run_goes_on_identically(recovered: list[dict[str, Any]]) -> None:
    for seen in recovered:
        assert seen["restored"] == ("step-00000004.a1", [])
        assert seen["restored progress"]["step"] == 4
        assert seen["restored progress"]["samples"] == 4 * GLOBAL_BATCH
        assert seen["undisturbed"]["cursor"]["next_sample"] == LAST * GLOBAL_BATCH
        assert seen["undisturbed"]["schedule"]["step"] == LAST
        assert differences(seen["continued"], seen["undisturbed"]) == []


def test_damage_on_one_rank_makes_all_fall_back(recovered: list[dict[str, Any]]) -> None:
    for seen in recovered:
        assert seen["fell back"][0] == "step-00000002.a1"
        assert differences(seen["continued from older"], seen["undisturbed"]) == []


def test_the_first_rank_warns_once_of_each_checkpoint_passed_over(recovered: list[dict[str, Any]]) -> None:
    (unfinished, why_unfinished), (damaged, why_damaged) = recovered[0]["fell back"][1]
    assert (unfinished, damaged) == ("step-00000005.a2", "step-00000004.a1")
    assert "never finished" in why_unfinished
    assert "CheckpointDamaged: shard-00001.distcp: the checksum" in why_damaged
    assert recovered[1]["fell back"][1] == []


def test_all_ranks_go_on_with_the_clock_of_the_first(recovered: list[dict[str, Any]]) -> None:
    # Step 2 was dumped after 20 s by the clock of rank 0 and 40 s by that of rank 1.
    assert [seen["clock"] for seen in recovered] == [20, 20]


def test_no_good_checkpoint_left_is_an_error_and_not_a_new_start(recovered: list[dict[str, Any]]) -> None:
    for seen in recovered:
        assert seen["all damaged"][0].startswith("RuntimeError: none of the 2 checkpoints")
    assert recovered[0]["all damaged"][1] == ["step-00000005.a2", "step-00000004.a1", "step-00000002.a1"]


def test_a_save_that_never_finished_is_no_checkpoint(recovered: list[dict[str, Any]]) -> None:
    for seen in recovered:
        assert seen["only unfinished"][0] is None
    assert len(recovered[0]["only unfinished"][1]) == 1


def test_other_data_is_refused_by_all(recovered: list[dict[str, Any]]) -> None:
    for seen in recovered:
        assert seen["other data"].startswith("ValueError: the data is not what the checkpoint was trained on")


def go_on_alone(rank: int, parent: str) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    """What one rank makes of the run that two began, and of a run that is its own from the beginning."""
    resumed, whole = Run(f"{parent}/cut", attempt=2), Run(f"{parent}/none", attempt=1)
    restored = resumed.recover.load()
    for run in (resumed, whole):
        run.train(LAST)
    return restored, resumed.standing(), whole.standing()


def test_a_run_goes_on_at_another_world_size(parent: Path, recovered: list[dict[str, Any]]) -> None:
    ((restored, resumed, whole),) = run_ranks(go_on_alone, 1, str(parent))
    assert restored == "step-00000002.a1"
    for what in ("cursor", "next batch", "schedule"):
        assert resumed[what] == whole[what]
    assert resumed["progress"]["metrics"]["loss"] == pytest.approx(whole["progress"]["metrics"]["loss"], rel=1e-5)
    for name, tensor in whole["tensors"].items():
        torch.testing.assert_close(resumed["tensors"][name], tensor, rtol=1e-4, atol=1e-5)


def test_ranks_agree_on_when_seconds_are_over_though_their_clocks_differ(recovered: list[dict[str, Any]]) -> None:
    for seen in recovered:
        assert seen["by the clock"] == [[4, 8, 12], [4, 8, 12]]
