"""The index of checkpoints: it spares reading manifests, and nothing depends on it."""

import json
import os
import shutil

import pytest

from areal_ray.checkpoint import Catalog, read_manifest
from areal_ray.checkpoint import catalog as catalog_module
from areal_ray.checkpoint import save as save_state
from areal_ray.checkpoint.retention import Retention
from areal_ray.config import KeepConfig
from areal_ray.distributed import Ranks
from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints

from .boxes import DAMAGE, Box, do_damage, save_box, weights

pytestmark = pytest.mark.unit


class Objects(LocalStorage):
    """As object storage: it does not say when a directory has changed."""

    def stamp(self, name):
        return None


@pytest.fixture(params=[LocalStorage, Objects], ids=["files", "objects"])
def run(request, tmp_path):
    return request.param(tmp_path)


@pytest.fixture
def looked(monkeypatch):
    """Names of the directories of which a manifest was read."""
    names = []

    def read(directory):
        names.append(directory.location.rpartition("/")[2])
        return read_manifest(directory)

    monkeypatch.setattr(catalog_module, "read_manifest", read)
    return names


def save(run, *steps, attempt=1, index=False):
    for step in steps:
        save_box(run.location, step, attempt)
    if index:
        Catalog(run).write_index(Catalog(run).summaries())


class Kept:
    """A Retention as an attempt has it, with what it deleted and what it said."""

    def __init__(self, run, **keep):
        self.run, self.deleted, self.said = run, [], []
        self.retention = Retention(Catalog(run), KeepConfig(**keep), list, self.deleted.append, self.said.append)

    def save(self, step, attempt=1):
        directory = save_box(self.run.location, step, attempt)
        self.retention.committed(Catalog.name(step, attempt), read_manifest(directory))

    @property
    def steps(self):
        return [step for _, step, _ in Catalog(self.run).names()]


def test_what_the_index_has_is_not_read_again(run, looked):
    save(run, 10, 20, 30)
    without = checkpoints.listing(run)
    save(run, index=True)
    looked.clear()
    assert checkpoints.listing(run) == without
    assert looked == []
    assert Catalog(run).unfinished(9) == []
    save(run, 40, attempt=2)
    assert [row["step"] for row in checkpoints.listing(run)] == [10, 20, 30, 40]
    assert looked == ["step-00000040.a2"]


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"[]", b"\xff", b'{"format": 1}', b'{"format": 2, "checkpoints": {}}'),
        b'{"format": 1, "checkpoints": []}',
        b'{"format": 1, "checkpoints": {"step-00000010.a1": 3, "other": {}}}',
        b'{"format": 1, "checkpoints": {"step-00000010.a1": {"info": [], "bytes": "?", "stamp": null}}}',
    ],
)
def test_a_torn_index_does_not_matter(run, text):
    save(run, 10, 20)
    expected = checkpoints.listing(run)
    run.replace("checkpoints.json", text)
    assert checkpoints.listing(run) == expected
    kept = Kept(run, last=1)
    kept.save(30)
    assert (kept.steps, kept.said) == ([30], [])


def test_an_index_with_checkpoints_that_are_gone_does_not_matter(run):
    save(run, 10, 20, 30, 40, index=True)
    for step in (30, 40):
        shutil.rmtree(f"{run.location}/step-000000{step}.a1")
    assert [row["step"] for row in checkpoints.listing(run)] == [10, 20]
    assert (Catalog(run).newest().step, Catalog(run).last_committed()) == (20, "step-00000020.a1")
    kept = Kept(run, last=2)
    kept.retention.apply()
    assert kept.steps == [20, 10]


@pytest.mark.parametrize("kind", [kind for kind, (*_, seen) in DAMAGE.items() if seen])
def test_an_index_that_is_wrong_about_the_newest_costs_no_good_one(run, kind):
    save(run, 10, 20, 30, 40, index=True)
    for step in (40, 30):
        do_damage(run.sub(f"step-000000{step}.a1"), kind)
    kept = Kept(run, last=1)
    kept.retention.apply()
    assert kept.steps == [40, 30, 20]
    assert kept.deleted == ["step-00000010.a1"]
    listed = json.loads(run.read("checkpoints.json"))["checkpoints"]
    assert list(listed) == ["step-00000020.a1"]


def test_an_index_that_is_wrong_about_the_best_costs_no_good_one(run):
    for step in (10, 20, 30, 40):  # the older the better
        info = {"step": step, "attempt": 1, "metrics": {"held_out_loss": float(step)}}
        save_state(run.sub(Catalog.name(step, 1)), {"box": Box(**weights())}, info, Ranks())
    save(run, index=True)
    do_damage(run.sub("step-00000010.a1"), "manifest torn")
    kept = Kept(run, last=1, best=1)
    kept.retention.apply()
    assert kept.steps == [40, 20, 10]


def test_a_directory_that_has_changed_is_looked_at_again(tmp_path, looked):
    run = LocalStorage(tmp_path)
    save(run, 10, 20, index=True)
    size = os.path.getsize(tmp_path / "step-00000010.a1" / "shard-00000.distcp")
    os.utime(f"{run.location}/step-00000010.a1", (1, 1))
    looked.clear()
    do_damage(run.sub("step-00000020.a1"), "shard deleted")
    assert [row["state"] for row in checkpoints.listing(run)] == [
        "good",
        f"shard-00000.distcp: missing, should be {size} bytes",
    ]
    assert sorted(looked) == ["step-00000010.a1", "step-00000020.a1"]


def test_the_index_has_a_checkpoint_no_longer_before_its_deletion_begins(run, monkeypatch):
    save(run, 10, 20, index=True)

    def refuse(self, name):
        assert name == "manifest.json"
        assert "step-00000010.a1" not in run.read("checkpoints.json").decode()
        raise OSError(16, "Device or resource busy")

    kept = Kept(run, last=1)
    with monkeypatch.context() as broken:
        broken.setattr(LocalStorage, "remove", refuse)
        kept.retention.apply()
    assert len(kept.said) == 1
    kept.retention.apply()
    assert (kept.steps, kept.deleted) == ([20], ["step-00000010.a1"])


def test_nothing_is_deleted_if_the_index_cannot_be_written(run, monkeypatch):
    save(run, 10, 20)
    kept = Kept(run, last=1)
    with monkeypatch.context() as broken:
        broken.setattr(LocalStorage, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        kept.retention.apply()
    assert (kept.steps, kept.said) == ([20, 10], ["could not look for checkpoints to delete: [Errno 28] No space left"])


def test_what_somebody_else_has_deleted_is_forgotten(run):
    save(run, 10, 20, 30)
    kept = Kept(run, last=1, every_steps=10)
    kept.save(40)
    shutil.rmtree(f"{run.location}/step-00000010.a1")
    kept.retention._keep = KeepConfig(last=1)
    kept.retention.apply()
    assert kept.deleted == ["step-00000030.a1", "step-00000020.a1"]
    assert list(kept.retention._load()) == ["step-00000040.a1"]


@pytest.mark.parametrize("keep", [{}, {"last": 1, "every_steps": 1}])
def test_saves_of_many_short_attempts_get_into_the_index(run, looked, keep):
    for attempt in range(1, 12):
        kept = Kept(run, **keep)
        for step in (1, 2, 3):
            kept.save(10 * attempt + step, attempt)
    assert len(kept.steps) == 33
    looked.clear()
    assert len(Catalog(run).summaries()) == 33
    assert len(looked) < 10


def test_of_a_run_of_an_older_version_every_start_adds_some(run, looked):
    save(run, *range(1, 61))
    for attempt in (2, 3, 4, 5):
        looked.clear()
        Kept(run).save(100 + attempt, attempt)
        assert len(looked) <= 16
    looked.clear()
    assert len(Catalog(run).summaries()) == 64
    assert len(looked) < 8
