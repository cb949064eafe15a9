"""A node whose device fails its check twice is left out, and the run finishes on the other one."""

import subprocess
import sys

import pytest

from .conftest import EXPERIMENT, ROOT, SMALL, Run

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def undisturbed_on_one(ray_cluster, tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("runs"), "alone")
    assert run.train("cluster.num_workers=1") == 0
    return run


@pytest.mark.parametrize("fast_restarts", ["auto", "off"])
def test_a_node_that_fails_twice_is_left_out_and_the_run_goes_on_to_the_same_bits(
    undisturbed_on_one, tmp_path, fast_restarts
):
    run = Run(tmp_path, "run")
    where = [f"run.storage_path={tmp_path}", "run.name=run"]
    own = ["objective.name=tests.ray.bad_device:CheckedLanguageModeling", f"cluster.fast_restarts={fast_restarts}"]
    arguments = ["--config", EXPERIMENT, *SMALL, *where, "cluster.num_workers=[1,2]", *own]
    command = [sys.executable, "-m", "tests.ray.nodes_script", "none", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    failures = run.events("bad_device")
    assert [(event["node"], event["uuid"]) for event in failures] == [("second", "GPU-fake")] * 2
    assert [event["node"] for event in run.events("left_out")] == ["second"]
    assert run.events("attempt")[-1]["world_size"] == 1
    assert done.stdout.count("second has failed twice and is left out from now on: GPU 0 (GPU-fake)") == 1
    assert "cluster.use_again='[second]' takes it back" in done.stdout
    assert run.result()["status"] == "finished"
    assert run.digest() == undisturbed_on_one.digest()
