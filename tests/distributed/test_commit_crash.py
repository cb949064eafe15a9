"""Killed between any two stages of a save: the next attempt finds the newest committed state, whole, and goes on."""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Iterator

import pytest

from areal_ray.checkpoint import Catalog
from areal_ray.cli.main import main as run_cli
from areal_ray.tools import checkpoints
from tests.distributed.killed_run import FILES, STAGES, Cut, Life
from tests.distributed.traps import MANIFEST, SHARDS

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=STAGES)
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Life:
    return Life(tmp_path_factory.mktemp("life") / "run", request.param == "beside the training")


@pytest.fixture(autouse=True)
def _sigpipe() -> Iterator[None]:
    before = signal.getsignal(signal.SIGPIPE)  # changed by `areal-ray ckpt`
    yield
    signal.signal(signal.SIGPIPE, before)


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
        entry.name: checkpoints.digest(life.run.sub(entry.name))
        for entry in Catalog(life.run).entries()
        if entry.manifest
    }
    cut_off = {name for _, _, name in Catalog(life.run).names()} - set(good)
    assert len(good) == 2
    assert bool(cut_off) != life.cleans_up
    assert run_cli(["ckpt", "gc", life.run.location, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["deleted"]) == cut_off
    assert {name: checkpoints.digest(life.run.sub(name)) for _, _, name in Catalog(life.run).names()} == good


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
