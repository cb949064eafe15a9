"""A node is lost with all that it kept: the run goes on from copies at partners, as many workers or fewer."""

import subprocess
import sys

import pytest

from areal_ray.storage import LocalStorage
from areal_ray.tools import verify_resume

from .conftest import EXPERIMENT, ROOT, SMALL, Run

pytestmark = pytest.mark.ray

EVERY = 5  # steps between two copies
LONG = [
    *SMALL,
    "train.steps=160",
    "checkpoint.every_steps=null",  # so that there is nothing else to go on from
    f"checkpoint.memory_every_steps={EVERY}",
    "checkpoint.memory_partner=true",
    "logging.every_steps=1",
    "logging.sample_ids=true",
    "eval.every_steps=null",
]


@pytest.fixture(scope="module")
def twin(ray_cluster, tmp_path_factory) -> Run:
    """The run without a loss."""
    run = Run(tmp_path_factory.mktemp("twin"), "twin")
    assert run.train(*LONG[len(SMALL) :], "checkpoint.memory_partner=false") == 0
    return run


def lose_a_node(run: Run, nodes: int, workers: str) -> str:
    where = [f"run.storage_path={run.path.parent}", f"run.name={run.path.name}", f"cluster.num_workers={workers}"]
    command = [
        sys.executable,
        "-m",
        "tests.ray.lost_node_script",
        str(nodes),
        "83",  # late enough for the first copies to have found their memory, however busy the machine is
        "--config",
        EXPERIMENT,
        *LONG,
        *where,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def assert_little_is_lost(run: Run, twin: Run) -> None:
    (restored,) = run.events("restored")
    assert restored["memory"] == f"step-{restored['step']:08d}.a1"
    assert restored["step"] >= 75
    assert run.result()["goodput"]["lost_steps"] <= EVERY
    assert run.lines("samples.jsonl") == twin.lines("samples.jsonl")
    assert run.result()["step"] == 160


def test_with_a_node_in_reserve_the_run_ends_in_the_same_bits(twin, tmp_path):
    run = Run(tmp_path, "run")
    out = lose_a_node(run, 3, "2")
    assert_little_is_lost(run, twin)
    assert "from memory, going on with step" in out
    assert [event["world_size"] for event in run.events("attempt")] == [2, 2]
    assert run.digest() == twin.digest()


def test_with_one_node_left_the_run_goes_on_there(twin, tmp_path):
    run = Run(tmp_path, "run")
    lose_a_node(run, 2, "[1,2]")
    assert_little_is_lost(run, twin)
    assert [event["world_size"] for event in run.events("attempt")] == [2, 1]
    (restored,) = run.events("restored")
    assert (restored["before"]["world_size"], restored["now"]["world_size"]) == (2, 1)
    ends = [LocalStorage(each.path / each.result()["checkpoint"]) for each in (twin, run)]
    assert verify_resume._distance(*ends)[0] <= verify_resume.BOUND
