"""A real `ray job submit` to a head node of the test's own."""

import json
import os
import subprocess
import sys

import pytest

from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints

from .conftest import EXPERIMENT, ROOT, Run
from .head import free_ports, started_head

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def head():
    """The environment that reaches it as clients of job submission do."""
    with started_head() as head:
        yield {name: value for name, value in head.environment.items() if name != "RAY_ADDRESS"}


def test_submitted_job_gives_the_same_checkpoint(head, undisturbed, tmp_path):
    run = Run(tmp_path, "submitted")
    command = [sys.executable, "-m", "areal_ray.cli.main", "submit", "--config", os.path.relpath(EXPERIMENT, ROOT)]
    fault = "faults=[{kind: sigkill, rank: 1, step: 6}]"
    done = subprocess.run([*command, *run.arguments, fault], cwd=ROOT, env=head, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished: step 12" in done.stdout
    assert (
        checkpoints.differences(
            LocalStorage(run.path / run.result()["checkpoint"]),
            LocalStorage(undisturbed.path / undisturbed.result()["checkpoint"]),
        )
        == []
    )
    assert run.result()["restarts"] == 1


def test_a_run_is_submitted_from_a_folder_of_one_s_own_stopped_in_the_middle_and_goes_on(head, tmp_path):
    """With Ray's three seconds for a job that is stopped, and an experiment that the nodes do not have."""

    def cli(*arguments):
        command = [sys.executable, "-m", "areal_ray.cli.main", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    env = {**head, "PYTHONPATH": ROOT}
    run = Run(tmp_path / "runs", "own")
    submit = ["submit", "--config", EXPERIMENT, *run.arguments]
    done = cli(*submit, "--detach", "train.steps=100000", "logging.every_steps=1")
    assert (done.returncode, done.stderr) == (0, "")
    while not (run.path / "metrics.jsonl").exists() or len(run.metrics()) < 3:
        assert cli("status", "own").returncode == 0
    again = cli(*submit)
    assert again.returncode == 2
    assert "own runs already, as job own-1" in again.stderr
    stopped = cli("stop", "own")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "the same command goes on from step-" in stopped.stdout
    step = run.metrics()[-1]["step"]
    assert run.result()["checkpoint"] == f"step-{step:08}.a1"
    assert "state         stopped, and saved" in cli("status", "own").stdout
    resumed = cli(*submit, f"train.stop_at={step + 2}", "train.steps=100000")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"restored step-{step:08}.a1, going on with step {step + 1}" in resumed.stdout
    assert "own-2" in cli("logs", "own").stdout


def test_a_job_s_own_environment_may_have_what_ours_has(head, tmp_path):
    run = Run(tmp_path, "own")
    variables = {"RAY_TRAIN_V2_ENABLED": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(tmp_path)}
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", "."]
    options = ["--runtime-env-json", json.dumps({"env_vars": variables}), "--", "python", "jobs/train.py"]
    train = ["--config", os.path.relpath(EXPERIMENT, ROOT), *run.arguments, "train.stop_at=2", "cluster.standbys=auto"]
    env = {**head, "RAY_AUTH_MODE": "token"}  # as `areal-ray submit` finds out by itself
    done = subprocess.run([*submit, *options, *train], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.result()["step"] == 2


def test_a_config_error_is_found_before_anything_is_uploaded(head):
    command = [sys.executable, "-m", "areal_ray.cli.main", "submit", "--config", EXPERIMENT, "train.step=3"]
    done = subprocess.run(command, cwd=ROOT, env=head, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "config error: command line: train.step: no such key; did you mean 'steps'?\n"


def test_no_cluster_says_how_to_start_one():
    (port,) = free_ports(1)
    env = {**os.environ, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
    command = [sys.executable, "-m", "areal_ray.cli.main", "submit", "--config", EXPERIMENT]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ray start --head" in done.stderr
    assert "Traceback" not in done.stderr
