"""Workers that are started again start in processes that were warm before."""

import threading
import time
from pathlib import Path

import pytest

from areal_ray.cluster.standbys import Standbys

from .models import train

pytestmark = pytest.mark.ray

WAIT_S = 120  # for standbys on a busy machine; the run goes on then, and the test fails


def computing(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.glob("[0-9]*")}


def test_killed_workers_come_back_in_processes_that_were_warm(undisturbed, run, tmp_path):
    folder = tmp_path / "processes"
    folder.mkdir()
    first, warm = set(), set()

    def watch() -> None:
        """Let the run go on to the fault when there are standbys."""
        give_up = time.monotonic() + WAIT_S
        while time.monotonic() < give_up and not (run.path / "events.jsonl").exists():
            time.sleep(0.1)
        while time.monotonic() < give_up and not run.events("standbys"):
            time.sleep(0.1)
        first.update(computing(folder))
        warm.update(process.pid for process in Standbys("worker", 0, lambda *_: None, print)._ready())
        (folder / "go").touch()

    watcher = threading.Thread(target=watch)
    watcher.start()
    fault = "faults=[{kind: sigkill, rank: 1, step: 8}]"
    overrides = ["cluster.standbys=auto", "checkpoint.async_save=false", "cluster.watchdog=null", fault]
    try:
        # The sixth step waits: two batches are of the evaluation at the beginning.
        assert train(run, "slow", *overrides, folder=str(folder), calls=7) == 0
    finally:
        watcher.join()
    assert run.digest() == undisturbed.digest()
    assert run.metrics() == undisturbed.metrics()
    assert [event["step"] for event in run.events("restored")] == [4]
    assert run.events("standbys")[0]["ready"] == 2
    assert run.events("standbys")[0]["memory_mb"] > 0
    assert (len(first), len(warm)) == (2, 2)
    assert computing(folder) == first | warm
