"""A submitted job whose driver is killed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil

from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints
from tests.clusters.runs import Process, seen_events
from tests.ray.conftest import EXPERIMENT, ROOT, Run
from tests.ray.head import started_head

_ONE = ("cluster.num_workers=1", "cluster.watchdog=null")
_STOP = ("faults=[{kind: hang, rank: 0, step: 10}]",)  # so that there is something left to do


def check(folder: Path) -> None:
    """A job whose driver is killed is submitted again, goes on, and ends in the bits of an undisturbed one."""
    with started_head() as head:
        reach = {name: value for name, value in head.environment.items() if name != "RAY_ADDRESS"}
        runs = [Run(folder, "undisturbed"), Run(folder, "killed")]
        submit = ["submit", "--retries", "1", "--config", os.path.relpath(EXPERIMENT, ROOT)]
        with Process(reach, folder / "undisturbed.log", *submit, *runs[0].arguments, *_ONE) as process:
            process.finish()
        with Process(reach, folder / "killed.log", *submit, *runs[1].arguments, *_ONE, *_STOP) as process:
            process.wait_for(lambda: seen_events(runs[1], "fault"), "the worker does not stand still")
            psutil.Process(_driver(runs[1])).kill()
            process.finish()
            text = process.text()
        assert "was ended by SIGKILL" in text, text
        assert "submitting it again, retry 1 of 1" in text, text
        assert [event["step"] for event in runs[1].events("restored")] == [8]
        places = [LocalStorage(run.path / run.result()["checkpoint"]) for run in runs]
        assert checkpoints.differences(*places) == []
        print(f"  went on from step 8, and ended in {runs[1].digest()[:16]}, as undisturbed", flush=True)


def _driver(run: Run) -> int:
    pid: int = json.loads((run.path / "driver.json").read_text())["pid"]
    return pid
