"""Lengths in steps, samples and epochs: which one counts, and what they come to."""

import pytest

from areal_ray.config import ConfigError, dump, in_steps, load
from areal_ray.config.layers import merged_text, read_layers
from areal_ray.config.schema import Config

from .test_config import TINY

pytestmark = pytest.mark.unit


def lengths(config):
    train, optim = config.train, config.optim
    return [(train.steps, train.samples, train.epochs), (optim.warmup_steps, optim.warmup_samples, optim.warmup_epochs)]


def test_the_last_unit_that_is_given_counts(tmp_path):
    assert lengths(load(TINY)) == [(200, None, None), (20, None, None)]
    assert lengths(load(TINY, ["train.epochs=3"])) == [(0, None, 3.0), (20, None, None)]
    assert lengths(load(TINY, ["train.samples=800", "optim.warmup_epochs=0.5"])) == [(0, 800, None), (0, None, 0.5)]
    assert lengths(load(TINY, ["train.epochs=null"])) == [(200, None, None), (20, None, None)]


def test_what_is_uploaded_or_shown_says_the_same():
    overrides = ["train.epochs=3", "optim.warmup_samples=80"]
    merged = merged_text(read_layers(TINY, overrides, Config))
    assert "steps: 200" not in merged
    assert "epochs: 3" in merged


def test_an_experiment_that_was_dumped_loads_again(tmp_path):
    config = load(TINY, ["train.epochs=3", "optim.schedule=wsd", "optim.decay_samples=80", "run.storage_path=/a"])
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(str(tmp_path / "again.yaml")) == config
    (tmp_path / "again.yaml").write_text(dump(in_steps(config, 800)))
    assert load(str(tmp_path / "again.yaml")) == in_steps(config, 800)


@pytest.mark.parametrize(
    ("rows", "epochs", "steps"), [(80, 3, 30), (81, 1, 11), (1000, 0.1, 13), (240, 0.1, 3), (8, 1000, 1000)]
)
def test_epochs_are_counted_exactly_and_rounded_up(rows, epochs, steps):
    config = load(TINY, [f"train.epochs={epochs}", "optim.warmup_steps=0"])  # batches of 8
    assert lengths(in_steps(config, rows))[0] == (steps, None, None)


def test_every_length_is_counted():
    given = ["train.samples=801", "optim.warmup_epochs=0.25", "optim.decay_samples=160", "optim.schedule=wsd"]
    config = load(TINY, given)
    assert config.length == "801 samples"
    counted = in_steps(config, 320)
    assert (counted.train.steps, counted.optim.warmup_steps, counted.optim.decay_steps) == (101, 10, 20)
    assert counted.length == "101 steps"
    assert in_steps(load(TINY), 320) == load(TINY)


@pytest.mark.parametrize(
    ("overrides", "key", "part"),
    [
        (["train.epochs=3", "train.steps=50"], "train.epochs", "train.steps in another unit"),
        (["train.epochs=0"], "train.epochs", "greater than 0"),
        (["train.steps=0"], "train.steps", "greater than 0"),
        (["optim.decay_steps=5"], "optim.schedule", "wsd alone"),
        (["optim.schedule=wsd", "optim.decay_steps=181"], "optim.decay_steps", "between 1 and .* = 180"),
    ],
)
def test_lengths_that_cannot_be_meant_are_refused(overrides, key, part):
    with pytest.raises(ConfigError, match=part) as caught:
        load(TINY, overrides)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["train.epochs=1"], "optim.warmup_steps"),
        (["train.epochs=5", "train.stop_at=60"], "train.stop_at"),
        (["train.epochs=5", "optim.warmup_epochs=5"], "optim.warmup_steps"),
        (["train.epochs=5", "faults=[{kind: exit, rank: 0, step: 60}]"], "faults[0].step"),
    ],
)
def test_lengths_that_do_not_go_together_are_refused_when_they_are_known(overrides, key):
    config = load(TINY, overrides)
    with pytest.raises(ConfigError) as caught:
        in_steps(config, 80)
    assert caught.value.key == key
