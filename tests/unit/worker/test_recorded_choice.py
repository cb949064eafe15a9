"""What `auto` was taken for: what a run's newest good checkpoint says of it, read before the engine is built."""

import pytest

from areal_ray.checkpoint import Catalog, save
from areal_ray.config import load
from areal_ray.distributed import Ranks
from areal_ray.storage import LocalStorage
from areal_ray.worker.wiring import _recorded
from tests.unit.checkpoint.boxes import Box, save_box, weights

pytestmark = pytest.mark.unit


def recorded(run, *overrides):
    return _recorded(load("conf/experiments/tiny.yaml", list(overrides)), Catalog(LocalStorage(run)))


def save_saying(run, step, how):
    info = {"step": step, "attempt": 1, "accumulate": how, "loss": "chunked"}
    save(LocalStorage(run).sub(Catalog.name(step, 1)), {"box": Box(**weights())}, info, Ranks())


def test_a_run_without_a_checkpoint_has_its_choice_before_it(tmp_path):
    assert recorded(tmp_path) == {}


def test_a_checkpoint_that_does_not_say_was_unsharded(tmp_path):
    save_box(tmp_path)
    assert recorded(tmp_path) == {"accumulate": "unsharded", "loss": "logits"}


def test_the_newest_good_checkpoint_counts_unless_the_user_says_how(tmp_path):
    save_saying(tmp_path, 1, "sharded")
    save_saying(tmp_path, 2, "unsharded")
    assert recorded(tmp_path)["accumulate"] == "unsharded"
    (tmp_path / Catalog.name(2, 1) / "manifest.json").write_text("{}")
    assert recorded(tmp_path) == {"accumulate": "sharded", "loss": "chunked"}
    assert recorded(tmp_path, "engine.accumulate=unsharded") == {"loss": "chunked"}
    assert recorded(tmp_path, "model.loss=logits") == {"accumulate": "sharded"}
    assert recorded(tmp_path, "engine.accumulate=unsharded", "model.loss=logits") == {}


@pytest.mark.parametrize(
    ("overrides", "base"),
    [([], "0123"), (["run.allow_changes=[model.path]"], None), (["run.allow_changes=[data]"], "0123")],
)
def test_the_base_of_an_adapter_must_be_the_same_unless_it_may_change(tmp_path, overrides, base):
    adapter = {"name": "lora", "args": {}, "base": {"path": "/models/base", "fingerprint": "0123"}}
    info = {"step": 1, "attempt": 1, "adapter": adapter}
    save(LocalStorage(tmp_path).sub(Catalog.name(1, 1)), {"box": Box(**weights())}, info, Ranks())
    fixed = ["engine.accumulate=sharded", "model.loss=logits", "adapter={name: lora}"]
    assert recorded(tmp_path, *fixed, *overrides).get("base") == base
