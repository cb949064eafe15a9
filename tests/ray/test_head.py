"""The head node goes under a run: a clear end, and the run goes on elsewhere."""

import subprocess
import sys

import pytest

from .conftest import EXPERIMENT, ROOT
from .head import started_head

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("component", ["gcs_server", "raylet"])
def test_a_head_node_that_goes_ends_the_run_with_a_word_and_it_goes_on_elsewhere(undisturbed, run, component):
    with started_head() as head:
        # Ray gives up after so long, by default a minute; the driver before it.
        environment = {**head.environment, "RAY_gcs_rpc_server_reconnect_timeout_s": "15"}
        stopped = "faults=[{kind: sigstop, rank: 1, step: 10}]"  # nothing is finished before the head node goes
        command = [sys.executable, "jobs/train.py", "--config", EXPERIMENT, *run.arguments, stopped]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as job:
            assert job.stdout is not None
            seen = ""
            for line in job.stdout:
                seen += line
                if "step  9/12" in line:
                    head.component(component).kill()
                    break
            seen += job.stdout.read()
    assert job.returncode == 1, seen
    assert "the head node" in seen
    assert f"the same command goes on from {run.result()['checkpoint']}" in seen
    assert run.result()["status"] == "failed"
    saved = run.result()["checkpoint"]
    assert saved is not None
    assert run.train(stopped) == 0
    assert [event["checkpoint"] for event in run.events("restored")] == [saved]
    assert run.digest() == undisturbed.digest()
