"""A run whose disk is full, for real: training goes on, older checkpoints stay, with room it is as if nothing was."""

import re
import threading
from contextlib import contextmanager

import pytest

from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints

from ..small_disk import small_disk
from .conftest import Run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NO_SPACE = "No space left on device"


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", megabytes=16) as disk:
        yield disk


@pytest.fixture
def run(ray_cluster, disk):
    return Run(disk.path, "run")


@pytest.fixture
def one_checkpoint(undisturbed):
    """Bytes of a checkpoint on disk."""
    return sum(path.stat().st_size for path in (undisturbed.path / "step-00000004.a1").iterdir())


@contextmanager
def as_soon_as(condition, act):
    """Do something, once, while the block runs."""
    over = threading.Event()

    def watch():
        while not over.wait(0.002):
            if condition():
                return act()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def in_ledger(run, kind):
    path = run.path / "events.jsonl"
    return path.exists() and f'"{kind}"' in path.read_text()


def test_a_full_disk_costs_a_save_and_nothing_else(undisturbed, run, disk, one_checkpoint, capfd):
    disk.leave(one_checkpoint * 3 // 2)
    with as_soon_as(lambda: in_ledger(run, "save_failed"), disk.make_room):
        assert run.train() == 0
    (failed,) = run.events("save_failed")
    assert (failed["step"], failed["checkpoint"]) == (8, "step-00000008.a1")
    assert NO_SPACE in failed["error"]
    out = capfd.readouterr().out
    assert "saving step-00000008.a1 failed" in out
    assert NO_SPACE in out
    assert [event["step"] for event in run.events("saved")] == [4, 12]
    assert sorted(path.name for path in run.path.glob("step-*")) == ["step-00000004.a1", "step-00000012.a1"]
    assert checkpoints.differences(*(LocalStorage(r.path / "step-00000004.a1") for r in (run, undisturbed))) == []
    assert run.result()["restarts"] == 0
    assert run.digest() == undisturbed.digest()


def test_a_disk_that_stays_full_stops_the_run_which_goes_on_when_there_is_room(
    undisturbed, run, disk, one_checkpoint, capfd
):
    every_two = ("checkpoint.every_steps=2", "checkpoint.max_failed_saves=2", "cluster.max_failures=0")
    disk.leave(one_checkpoint * 3 // 2)
    assert run.train(*every_two) == 1
    panel = capfd.readouterr().err
    assert NO_SPACE in panel
    assert "is full, or its quota used up" in panel
    assert re.search("worker  rank [01] on node", panel)  # whose file it was that did not fit any more
    assert [event["step"] for event in run.events("save_failed")] == [4, 6]
    assert [event["step"] for event in run.events("saved")] == [2]
    assert (run.result()["status"], run.result()["checkpoint"]) == ("failed", "step-00000002.a1")
    assert checkpoints.check(LocalStorage(run.path / "step-00000002.a1")) > 0
    disk.make_room()
    assert run.train(*every_two) == 0
    assert [event["checkpoint"] for event in run.events("restored")] == ["step-00000002.a1"]
    assert run.digest() == undisturbed.digest()
