"""One Ray cluster for the whole tier, runs of a model that trains in seconds, and what to ask of them."""

import json
import tempfile
from pathlib import Path

import pytest

from areal_ray.cli.main import main as run_cli
from areal_ray.config import load
from areal_ray.driver.connect import cluster
from areal_ray.run.metric_names import CLOCK
from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints

ROOT = Path(__file__).parents[2]
_PREPARED = tempfile.TemporaryDirectory(prefix="areal_ray-tests-")  # the corpus of all runs: made once
EXPERIMENT = str(ROOT / "conf/experiments/tiny.yaml")
SMALL = [
    "model.config.hidden_size=64",
    "model.config.intermediate_size=128",
    "model.config.num_hidden_layers=2",
    "model.config.head_dim=16",
    "cluster.standbys=off",  # processes for restarts that come before they are ready, on cores that are busy
    "optim.warmup_steps=4",
    "train.steps=12",
    "train.seq_len=64",
    "checkpoint.every_steps=4",
    "checkpoint.memory_every_steps=null",  # what is to be seen is how a run comes back from checkpoints
    "eval.every_steps=6",
    "eval.batches=2",
    "logging.every_steps=3",
    f"data.prepared_path={_PREPARED.name}",
]


@pytest.fixture(scope="session")
def ray_cluster():
    """A local cluster as the driver starts one, shared by the runs of the tier."""
    with cluster(load(EXPERIMENT, [*SMALL, "cluster.env={OF_THE_CONFIG: seen}"])):
        yield


class Run:
    """A run directory and the command that works on it."""

    def __init__(self, storage_path: Path, name: str) -> None:
        self.path = storage_path / name
        self._where = [f"run.storage_path={storage_path}", f"run.name={name}"]

    def train(self, *overrides: str) -> int:
        return run_cli(["train", "--config", EXPERIMENT, *SMALL, *self._where, *overrides])

    @property
    def arguments(self) -> list[str]:
        return [*SMALL, *self._where]

    def result(self) -> dict:
        return json.loads((self.path / "result.json").read_text())

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.path / name).read_text().splitlines()]

    def events(self, kind: str) -> list[dict]:
        return [event for event in self.lines("events.jsonl") if event["event"] == kind]

    def digest(self) -> str:
        return checkpoints.digest(LocalStorage(self.path / self.result()["checkpoint"]))

    def metrics(self) -> list[dict]:
        """The logged lines without what the clock says."""
        return [{k: v for k, v in x.items() if k not in CLOCK} for x in self.lines("metrics.jsonl")]


@pytest.fixture(scope="session")
def undisturbed(ray_cluster, tmp_path_factory) -> Run:
    """The run that all others must equal."""
    run = Run(tmp_path_factory.mktemp("runs"), "undisturbed")
    assert run.train() == 0
    return run


@pytest.fixture
def run(ray_cluster, tmp_path) -> Run:
    return Run(tmp_path, "run")
