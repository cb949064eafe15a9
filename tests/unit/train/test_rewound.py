"""Logs of a run that goes on from an older checkpoint, as a later one could not be read, and then from that one."""

import pytest
import torch

from areal_ray.checkpoint import Catalog, reader
from areal_ray.run import RunDir
from areal_ray.run.logs.rewound import REWOUND
from areal_ray.storage import LocalStorage
from areal_ray.train.cadence import Cadence
from areal_ray.train.sinks import MetricsFile
from areal_ray.train.tracking import StepMetrics
from tests.fuzz.state import SAMPLES_PER_STEP, Engine, Job, restore_run

pytestmark = pytest.mark.unit


def job(run):
    metrics = StepMetrics(Cadence(1), [MetricsFile(run, print)], 100, 1, 32)
    return Job(Engine({"weight": torch.zeros(4)}), metrics=metrics)


def log(run, *steps):
    for step in steps:
        run.log_metrics(step, {"loss": float(step)})
        run.log_samples((step - 1) * SAMPLES_PER_STEP, [step] * SAMPLES_PER_STEP)
    run.flush()


def logged(run):
    steps = [line["step"] for line in run.metrics()]
    assert [line["first"] for line in run.samples()] == [(step - 1) * SAMPLES_PER_STEP for step in steps]
    return steps


@pytest.fixture
def run(tmp_path):
    """Of 8 steps, the last 2 of them behind the checkpoints of steps 3 and 6."""
    run = RunDir(LocalStorage(tmp_path))
    saved = job(run)
    run.event("attempt", attempt=1, world_size=1)
    recover = saved.recover(run, 1, {"world_size": 1, "mesh": {"shard": 1}}, print)
    log(run, *range(1, 9))
    for step in (3, 6):
        saved.go_to(step)
        recover.save(step, {})
        recover.finish()
    return run


def restored(run, tmp_path, unreadable=()):
    """The step that a start goes on behind, while some checkpoints cannot be read."""
    hidden = [Catalog(run.storage).directory(name).location for name in unreadable]
    there = job(run)
    with pytest.MonkeyPatch.context() as patch:
        read = LocalStorage.read_range

        def fail(self, name, *where):
            if self.location in hidden and name.endswith(".sums"):
                raise PermissionError(13, "denied", name)
            return read(self, name, *where)

        patch.setattr(LocalStorage, "read_range", fail)
        patch.setattr(reader, "AGAIN_S", 0.0)
        restore_run(tmp_path, there, [])
    return there.progress.step


def test_a_checkpoint_that_can_be_read_again_has_its_lines_again(run, tmp_path):
    later = Catalog.name(6, 1)
    assert restored(run, tmp_path, [later]) == 3
    assert logged(run) == [1, 2, 3]
    log(run, 4)  # and then the workers die
    assert restored(run, tmp_path, [later]) == 3
    assert restored(run, tmp_path) == 6
    assert logged(run) == [1, 2, 3, 4, 5, 6]
    assert run.storage.size(REWOUND) is None


def test_lines_of_what_was_never_read_again_are_forgotten(run, tmp_path):
    assert restored(run, tmp_path, [Catalog.name(6, 1)]) == 3
    assert run.storage.size(REWOUND)
    log(run, *range(4, 8))
    ahead = job(run)
    ahead.go_to(7)
    recover = ahead.recover(run, 9, {"world_size": 1, "mesh": {"shard": 1}}, print)
    recover.save(7, {})
    recover.finish()
    assert restored(run, tmp_path) == 7
    assert logged(run) == list(range(1, 8))
    assert run.storage.size(REWOUND) is None


def test_a_restore_that_passes_nothing_over_keeps_nothing(run, tmp_path):
    assert restored(run, tmp_path) == 6
    assert logged(run) == [1, 2, 3, 4, 5, 6]
    assert run.storage.size(REWOUND) is None


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"7", b'{"metrics": 3}', b'{"metrics": [3, {"step": "x"}, {}]}']
)
def test_what_is_damaged_of_them_is_no_reason_not_to_train(run, tmp_path, content):
    run.storage.replace(REWOUND, content)
    assert restored(run, tmp_path, [Catalog.name(6, 1)]) == 3
    run.storage.replace(REWOUND, content)
    assert restored(run, tmp_path) == 6
    assert run.storage.size(REWOUND) is None


def test_what_cannot_be_read_of_them_is_no_reason_not_to_train(run, tmp_path):
    (tmp_path / REWOUND).mkdir()
    said = []
    there = job(run)
    restore_run(tmp_path, there, said)
    assert there.progress.step == 6
    assert any(line.startswith("could not keep or bring back lines of the logs: ") for line in said)
