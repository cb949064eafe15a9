"""Runs with Ray's public API alone: the same promises, the same bits; also where Ray's internals cannot be imported."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest
import yaml

from .conftest import EXPERIMENT, ROOT, Run
from .models import train
from .test_elastic import assert_every_batch_once, change_nodes, sizes

pytestmark = pytest.mark.ray

OFF = "cluster.fast_restarts=off"
SYNC = "checkpoint.async_save=false"
# A Ray whose internals have moved, as far as this package sees it; Ray itself finds them.
ABSENT = """
import builtins, importlib, sys

NAMES = ("ray._private", "ray._raylet", "ray._common", "ray.core.generated", "ray.experimental.internal_kv",
         "ray.train._internal", "ray.train.v2._internal")

def check(importer, *modules):
    if str(importer).startswith("areal_ray"):
        for module in modules:
            if any(f"{module}.".startswith(f"{name}.") for name in NAMES):
                raise ImportError(f"{module} is hidden from {importer}")

def wrapped_import(name, globals=None, locals=None, fromlist=(), level=0, _real=builtins.__import__):
    if level == 0 and globals is not None:
        check(globals.get("__name__"), name, *(f"{name}.{each}" for each in fromlist or ()))
    return _real(name, globals, locals, fromlist, level)

def wrapped_import_module(name, package=None, _real=importlib.import_module):
    check(sys._getframe(1).f_globals.get("__name__"), name)
    return _real(name, package)

builtins.__import__, importlib.import_module = wrapped_import, wrapped_import_module
"""


@pytest.fixture
def alone(tmp_path) -> Run:
    """A run directory for a cluster of its own."""
    return Run(tmp_path, "run")


def command(run: Run, *overrides: str) -> list[str]:
    return [sys.executable, "jobs/train.py", "--config", EXPERIMENT, *run.arguments, *overrides]


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | more


def test_kills_at_two_steps_change_nothing(undisturbed, run):
    faults = "faults=[{kind: sigkill, rank: 1, step: 6}, {kind: sigkill, rank: 0, step: 11}]"
    assert run.train(OFF, SYNC, faults) == 0
    assert run.digest() == undisturbed.digest()
    assert run.metrics() == undisturbed.metrics()
    assert run.result()["restarts"] == 2
    assert [event["step"] for event in run.events("restored")] == [4, 8]
    assert [event["attempt"] for event in run.events("attempt")] == [1, 2, 3]
    assert [event["rank"] for event in run.events("failure")] == [1, 0]


def test_where_ray_s_internals_cannot_be_imported_a_kill_changes_nothing(undisturbed, alone, tmp_path):
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(ABSENT)
    path = os.pathsep.join([str(tmp_path / "hook"), str(ROOT)])
    fault = "faults=[{kind: sigkill, rank: 1, step: 6}]"
    done = subprocess.run(
        command(alone, SYNC, fault, "cluster.standbys=auto"),
        cwd=ROOT,
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert alone.digest() == undisturbed.digest()
    assert alone.metrics() == undisturbed.metrics()
    out = done.stdout
    reason = re.escape("ray._private.worker cannot be imported (ray._private.worker is hidden from areal_ray")
    assert re.search(f"restarts take longer, with Ray's public API alone: {reason}.*, and [0-9]+ more", out)
    assert re.search(r"worker 1 failed: the worker process died", out)
    assert re.search(r"attempt 2: .* restored step-00000004.a1, going on with step 5", out)
    assert "[areal_ray]" not in out
    assert "finished: step 12" in out
    recorded = yaml.safe_load((alone.path / "config.yaml").read_text())["cluster"]
    assert [recorded[key] for key in ("fast_restarts", "standbys", "template")] == ["auto", "auto", True]
    assert "is hidden from" not in out.replace("is hidden from", "", 1) + done.stderr


def test_the_same_error_twice_ends_the_run_in_one_panel(run, tmp_path, capfd):
    assert train(run, "poisoned", OFF, "cluster.watchdog=null", folder=str(tmp_path), calls=7) == 1
    out, panel = capfd.readouterr()
    assert "the same error at step" in out
    assert "ValueError: a batch that this model cannot take" in panel
    assert "training failed" in panel
    assert len(run.events("failure")) == 2
    assert run.result()["status"] == "failed"


def test_failures_are_counted_up_to_their_limit_and_the_same_command_goes_on(undisturbed, run, capfd):
    fault = "faults=[{kind: exception, rank: 1, step: 6}]"
    assert run.train(OFF, SYNC, "cluster.max_failures=0", fault) == 1
    assert "FaultInjected: the configured fault: an exception on rank 1 before step 6" in capfd.readouterr().err
    snapshot = run.path / "checkpoint_manager_snapshot.json"
    snapshot.write_text(snapshot.read_text()[:-20])  # torn
    assert run.train(OFF, SYNC, "cluster.max_failures=0", fault) == 0
    assert run.digest() == undisturbed.digest()


def kill_controller(job: subprocess.Popen) -> None:
    for process in psutil.Process(job.pid).children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[0].startswith("ray::TrainController"):
                process.kill()


def test_a_job_whose_controller_dies_goes_on_until_it_is_told_to_stop(alone):
    long = ["train.steps=1000000", "checkpoint.every_steps=50", "eval.every_steps=null", "logging.sample_ids=true"]
    with subprocess.Popen(
        command(alone, OFF, *long), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        seen = ""
        for line in job.stdout:
            trains = "loss" in line and "s/step" in line
            if trains and "s/step" not in seen:
                kill_controller(job)
            elif trains and "attempt 2" in seen:
                job.send_signal(signal.SIGTERM)
                break
            seen += line
        seen += job.stdout.read()
    assert job.returncode == 130, seen
    assert "starting Ray Train again" in seen
    assert len(alone.events("controller_died")) == 1
    assert [event["attempt"] for event in alone.events("attempt")] == [1, 2]
    (left,) = alone.events("left")
    assert left["reason"] == "stop"
    assert "saving, then stopping" in seen
    assert f"goes on from step-{left['step']:08d}.a2" in seen
    assert alone.result()["status"] == "interrupted"
    firsts = [line["first"] for line in alone.lines("samples.jsonl")]
    assert firsts == [8 * step for step in range(alone.result()["step"])]


def test_a_node_that_is_taken_back_is_left_in_time(alone):
    change_nodes("drain", alone, OFF)
    assert sizes(alone) == [2, 1]
    left = alone.events("left")[0]
    assert left["reason"] == "preempted"
    assert [event["step"] for event in alone.events("restored")] == [left["step"]]
    assert_every_batch_once(alone)
