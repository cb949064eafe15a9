"""Which checkpoints stay, and how the others go."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_ray.checkpoint import Catalog, Entry, Manifest
from areal_ray.checkpoint.retention import Retention, deletable
from areal_ray.config import ConfigError, KeepConfig, load
from areal_ray.storage import LocalStorage
from tests.unit.config.test_config import TINY

from .boxes import do_damage, save_box

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
def test_the_newest_good_one_is_never_deletable(states, last, every_steps, best):
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


class Kept:
    """A Retention over a run directory, with what it deleted and what it said."""

    def __init__(self, path, **keep):
        self.catalog, self.deleted, self.said, self.distrusted = Catalog(LocalStorage(path)), [], [], set()
        self.retention = Retention(
            self.catalog, KeepConfig(**keep), lambda: self.distrusted, self.deleted.append, self.said.append
        )

    @property
    def steps(self):
        return [step for _, step, _ in self.catalog.names()]


@pytest.fixture
def three(tmp_path):
    for step in (10, 20, 30):
        save_box(tmp_path, step)
    return Kept(tmp_path, last=1)


def test_what_no_rule_keeps_is_deleted_and_told(three):
    three.retention.apply()
    assert (three.steps, three.said) == ([30], [])
    assert three.deleted == ["step-00000020.a1", "step-00000010.a1"]


def test_what_is_distrusted_stays_and_is_not_counted(three):
    three.distrusted = {"step-00000030.a1"}
    three.retention.apply()
    assert three.steps == [30, 20]


def test_nothing_is_deleted_while_it_is_not_known_what_to_distrust(three):
    def unknown():
        raise OSError(5, "Input/output error")

    three.retention._distrusted = unknown
    three.retention.apply()
    assert three.steps == [30, 20, 10]
    assert three.said == ["could not look for checkpoints to delete: [Errno 5] Input/output error"]


def test_what_cannot_be_deleted_is_said_and_tried_again(three, monkeypatch):
    def refuse(_):
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as broken:
        broken.setattr(LocalStorage, "delete", refuse)
        three.retention.apply()
    assert (three.deleted, len(three.said)) == ([], 2)
    three.retention.clean_up(2)
    assert three.deleted == ["step-00000020.a1", "step-00000010.a1"]  # without a manifest they are no checkpoints


def test_what_earlier_attempts_left_unfinished_is_cleaned_up(tmp_path):
    for attempt in (1, 2, 3):
        do_damage(save_box(tmp_path, 10 * attempt, attempt), "manifest deleted")
    save_box(tmp_path, 5, 1)
    run = Kept(tmp_path)
    run.retention.clean_up(3)
    assert sorted(run.steps) == [5, 30]
    assert sorted(run.deleted) == ["step-00000010.a1", "step-00000020.a2"]


def test_what_no_save_began_is_left_and_said(tmp_path):
    do_damage(save_box(tmp_path, 10), "manifest deleted")
    plain = tmp_path / "step-00000020.a1"  # as torch's own `dcp.save` leaves it, copied here by hand
    plain.mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (plain / name).write_bytes(b"mine")
    run = Kept(tmp_path)
    run.retention.clean_up(3)
    run.retention.discard(plain.name)
    assert (run.steps, run.deleted) == ([20], ["step-00000010.a1"])
    assert sorted(path.name for path in plain.iterdir()) == [".metadata", "__0_0.distcp"]
    assert run.said == [
        "cleaned up saves of earlier attempts that were never finished: step-00000010.a1",
        "left as it is, without a manifest and with files that no save writes: step-00000020.a1",
    ]


@pytest.mark.parametrize("committed", [True, False])
def test_what_a_failed_save_left_is_discarded_unless_it_was_committed(tmp_path, committed):
    save_box(tmp_path, 10)
    if not committed:
        os.remove(tmp_path / "step-00000010.a1" / "manifest.json")
    run = Kept(tmp_path)
    run.retention.discard("step-00000010.a1")
    assert run.steps == ([10] if committed else [])
    assert run.deleted == []
