"""verify-resume on runs that were never run: what is broken is found."""

import random

import pytest
import torch

from areal_ray.checkpoint import Catalog, save
from areal_ray.config import ConfigError, load
from areal_ray.distributed import Ranks
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.tools import verify_resume as module
from areal_ray.tools.verify_resume import Segment, _close, _exact, _kills, _resized, verify_resume
from tests.unit.checkpoint.boxes import Box
from tests.unit.config.test_config import TINY

pytestmark = pytest.mark.unit

STEPS = 4
THERE_AND_BACK = [Segment(1, 2, ()), Segment(2, 1, ((2, 0),)), Segment(STEPS, 2, ())]


def write_run(folder, weight=1.0, kills=0, sizes=(2,), skip=None, loss=0.5, lr=0.1):
    """A run directory as a run would leave it."""
    storage = LocalStorage(folder)
    storage.ensure()
    run = RunDir(storage)
    for attempt, size in enumerate(sizes, start=1):
        run.event("attempt", attempt=attempt, world_size=size)
    for _ in range(kills):
        run.event("failure", rank=0)
    for step in range(1, STEPS + 1):
        run.log_metrics(step, {"loss": loss, "lr": lr, "step_time_s": random.random()})
        if step != skip:
            run.log_samples(8 * (step - 1), list(range(8)))
    name = Catalog.name(STEPS, 1)
    state = Box(model={"w": torch.full((3,), weight)}, schedule={"step": STEPS})
    save(storage.sub(name), {"engine": state}, {"step": STEPS, "attempt": 1}, Ranks())
    run.write_result({"checkpoint": name})
    return storage


@pytest.fixture
def undisturbed(tmp_path):
    return write_run(tmp_path / "undisturbed")


def broken(checks):
    return [check.what for check in checks if not check.kept]


def test_a_run_that_is_the_same_is_found_to_be(undisturbed, tmp_path):
    assert broken(_exact("killed", undisturbed, write_run(tmp_path / "b", kills=2, sizes=(2, 2, 2)), 2)) == []
    resized = write_run(tmp_path / "c", kills=1, sizes=(2, 1, 1, 2), weight=1.0 + 1e-6)
    assert broken(_close("resized", undisturbed, resized, THERE_AND_BACK, 1e-5)) == []


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"kills": 1}, ["kills that happened"]),
        ({"kills": 2, "skip": 3}, ["global batches, sample ids in order"]),
        ({"kills": 2, "loss": 0.6}, ["logged metrics"]),
        ({"kills": 2, "weight": 1.0000001}, ["digest of the end"]),
    ],
)
def test_what_a_killed_run_does_not_keep_is_named(undisturbed, tmp_path, wrong, what):
    assert broken(_exact("killed", undisturbed, write_run(tmp_path / "b", **wrong), 2)) == what


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"sizes": (2, 1)}, ["numbers of workers"]),
        ({"kills": 0}, ["kills that happened"]),
        ({"skip": 4}, ["global batches, sample ids in order"]),
        ({"lr": 0.2}, ["learning rates"]),
        ({"weight": 1.01}, ["weights, |a-b| / |a|"]),
        ({"weight": float("nan")}, ["weights, |a-b| / |a|"]),
    ],
)
def test_what_a_resized_run_does_not_keep_is_named(undisturbed, tmp_path, wrong, what):
    run = write_run(tmp_path / "b", **{"kills": 1, "sizes": (2, 1, 2), **wrong})
    assert broken(_close("resized", undisturbed, run, THERE_AND_BACK, 1e-5)) == what


def test_kills_are_drawn_from_the_seed_and_lie_in_the_run():
    drawn = [_kills(random.Random(7), 5, 1, 40, 3) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len({step for step, _ in drawn[0]}) == 5
    assert all(1 < step <= 40 and 0 <= rank < 3 for step, rank in drawn[0])


def test_the_number_of_workers_goes_there_and_back():
    config = load(TINY, ["cluster.num_workers=4"])
    segments = _resized(random.Random(0), config, 4, 3)
    assert [segment.workers for segment in segments] == [4, 2, 4]  # 3 do not share a global batch of 8
    assert sum(len(segment.kills) for segment in segments) == 3
    ends = [segment.stop_at for segment in segments]
    assert ends == sorted(set(ends))
    assert ends[-1] == config.last_step


def test_too_few_steps_for_the_kills_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="too few"):
        verify_resume(TINY, ["train.steps=4", "optim.warmup_steps=1"], tmp_path, 0, 3)


@pytest.mark.parametrize(
    ("overrides", "promised"),
    [
        ([], ["_exact killed", "_close resized"]),
        (["cluster.use_gpu=true", "engine.deterministic=true"], ["_exact killed", "_close resized"]),
        (["cluster.use_gpu=true"], ["_close killed", "_close resized"]),
    ],
)
def test_on_gpus_a_kill_keeps_the_bits_only_where_that_is_promised(tmp_path, monkeypatch, overrides, promised):
    asked = []
    monkeypatch.setattr(module, "_run", lambda *_: None)
    for name in ("_exact", "_close"):
        monkeypatch.setattr(module, name, lambda run, *_, name=name: asked.append(f"{name} {run}") or [])
    assert verify_resume(TINY, overrides, tmp_path / "runs", seed=0, kills=2) == []
    assert asked == promised
