"""Nodes that come, go and are taken back, and being told to stop: the run saves, leaves and goes on from that step."""

import os
import re
import signal
import subprocess
import sys

import pytest

from .conftest import EXPERIMENT, ROOT, SMALL, Run

pytestmark = pytest.mark.ray

# Longer than any test: each is stopped when it has seen what it is about.
LONG = [*SMALL, "train.steps=1000000", "checkpoint.every_steps=50", "eval.every_steps=null", "logging.sample_ids=true"]


def change_nodes(change: str, run: Run, *overrides: str) -> str:
    """Train while a node is added, removed or drained, until the run has saved once more; what was printed."""
    where = [f"run.storage_path={run.path.parent}", f"run.name={run.path.name}"]
    arguments = ["--config", EXPERIMENT, *LONG, *where, "cluster.num_workers=[1,2]", *overrides]
    command = [sys.executable, "-m", "tests.ray.nodes_script", change, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 130, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def alone(tmp_path) -> Run:
    """A run directory for a cluster of its own."""
    return Run(tmp_path, "run")


def sizes(run: Run) -> list[int]:
    return [event["world_size"] for event in run.events("attempt")]


def assert_every_batch_once(run: Run) -> None:
    firsts = [line["first"] for line in run.lines("samples.jsonl")]
    assert firsts == [8 * step for step in range(run.result()["step"])]


def test_a_node_that_comes_is_used_and_no_finished_step_is_lost(alone):
    out = change_nodes("add", alone)
    assert sizes(alone) == [1, 2]
    assert "there is room for 2 workers instead of 1" in out
    left = alone.events("left")[0]
    assert left["reason"] == "resize"
    assert [(event["step"], event["before"]["world_size"]) for event in alone.events("restored")] == [(left["step"], 1)]
    assert alone.result()["restarts"] == 0
    assert_every_batch_once(alone)


def test_a_node_that_comes_with_another_torch_is_left_out(alone):
    out = change_nodes("strange", alone)
    assert sizes(alone) == [1, 1]
    (event,) = alone.events("left_out")
    assert event["node"] == "second"
    assert re.search(r"has torch 2\.99\.0 \(the driver has 2\.\S+\): all nodes must have the same", event["why"])
    assert out.count("second is left out from now on: ") == 1
    assert alone.result()["restarts"] == 0
    assert_every_batch_once(alone)


def test_a_node_that_goes_leaves_the_run_on_what_is_left(alone):
    out = change_nodes("remove", alone)
    assert sizes(alone) == [2, 1]
    assert re.search(r"worker [01] failed", out)  # which of them was on that node is Ray's choice
    assert alone.result()["restarts"] == 1
    assert_every_batch_once(alone)


def test_a_node_that_is_taken_back_is_left_in_time(alone):
    out = change_nodes("drain", alone)
    assert sizes(alone) == [2, 1]
    left = alone.events("left")[0]
    assert left["reason"] == "preempted"
    assert [event["step"] for event in alone.events("restored")] == [left["step"]]
    assert "a node is being taken away" in out
    assert alone.result()["restarts"] == 0
    assert_every_batch_once(alone)


def test_a_job_that_is_told_to_stop_saves_and_goes_on_later(alone):
    where = [f"run.storage_path={alone.path.parent}", f"run.name={alone.path.name}"]
    command = [sys.executable, "jobs/train.py", "--config", EXPERIMENT, *LONG, *where]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        seen = ""
        for line in job.stdout:
            seen += line
            if "step  " in line and "loss" in line and "saving" not in seen:
                job.send_signal(signal.SIGTERM)
                break
        seen += job.stdout.read()
    assert job.returncode == 130
    (left,) = alone.events("left")
    assert f"goes on from step-{left['step']:08d}.a1" in seen
    assert alone.result()["status"] == "interrupted"
    assert alone.result()["step"] == left["step"]
    assert_every_batch_once(alone)
