"""Which checkpoints stay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_ray.checkpoint import Entry, Manifest
from areal_ray.checkpoint.retention import deletable
from areal_ray.config import ConfigError, KeepConfig, load
from tests.unit.config.test_config import TINY

pytestmark = pytest.mark.unit


def entry(step, loss=None, problem=None):
    metrics = {} if loss is None else {"held_out_loss": loss}
    manifest = None if problem else Manifest({"metrics": metrics}, {})
    return Entry(f"step-{step:08d}.a1", step, 1, manifest, problem)


def left(entries, keep):
    gone = {e.name for e in deletable(entries, keep)}
    return [e.step for e in entries if e.name not in gone]


STEPS = [entry(step) for step in (60, 50, 40, 30, 20, 10)]


def test_by_default_all_stay():
    assert deletable(STEPS, KeepConfig()) == []


def test_the_last_ones_stay():
    assert left(STEPS, KeepConfig(last=2)) == [60, 50]


def test_every_so_many_steps_stay_for_good():
    assert left(STEPS, KeepConfig(last=1, every_steps=20)) == [60, 40, 20]


@pytest.mark.parametrize(("mode", "expected"), [("min", [60, 30]), ("max", [60, 50])])
def test_the_best_stay(mode, expected):
    entries = [entry(60, 3.0), entry(50, 9.0), entry(40), entry(30, 1.0), entry(20, float("nan"))]
    assert left(entries, KeepConfig(last=1, best=1, mode=mode)) == expected


def test_what_is_not_a_number_is_not_the_best():
    assert left([entry(60), entry(50, float("nan")), entry(40, 2.0)], KeepConfig(last=1, best=1)) == [60, 40]


def test_what_is_damaged_is_not_counted_and_not_touched():
    entries = [entry(60, problem="torn"), entry(50), entry(40), entry(30)]
    assert left(entries, KeepConfig(last=2)) == [60, 50, 40]


@given(
    st.lists(st.tuples(st.integers(1, 200), st.booleans(), st.none() | st.floats()), unique_by=lambda x: x[0]),
    st.integers(1, 5),
    st.none() | st.integers(1, 50),
    st.integers(0, 3),
)
def test_the_newest_good_one_is_never_expendable(states, last, every_steps, best):
    entries = [entry(step, loss, None if good else "torn") for step, good, loss in sorted(states, reverse=True)]
    gone = deletable(entries, KeepConfig(last=last, every_steps=every_steps, best=best))
    good = [e for e in entries if e.problem is None]
    assert all(e.problem is None for e in gone)
    assert not good or good[0] not in gone
    assert len(good) - len(gone) >= min(last, len(good))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("checkpoint.keep.best=2", "checkpoint.keep.last"),
        ("checkpoint.keep.metric=los", "checkpoint.keep.metric"),
        ("checkpoint.keep.best=-1", "checkpoint.keep.best"),
    ],
)
def test_rules_that_would_do_nothing_are_config_errors(override, key):
    with pytest.raises(ConfigError) as caught:
        load(TINY, [override])
    assert caught.value.key == key
