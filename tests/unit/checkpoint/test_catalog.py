"""Which checkpoints a run has, which is the newest good one, and what is restored if that one is damaged."""

import shutil
from contextlib import contextmanager

import pytest
import torch

from areal_ray.checkpoint import Catalog, SyncWriter
from areal_ray.distributed import Ranks
from areal_ray.storage import LocalStorage
from areal_ray.train.recovery import RecoverHandler, SavePolicy

from .boxes import DAMAGE, Box, do_damage, save_box

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path):
    return LocalStorage(tmp_path)


def saved(run, step, attempt=1):
    return save_box(run.location, step, attempt, weight=torch.full((2,), float(step)), step_of_box=step)


class Warnings:
    """A Journal that keeps what was passed over."""

    def __init__(self):
        self.of = []

    def begins(self, checkpoint, step): ...

    def saved(self, dump, blocked_s, waited_s, total_s): ...

    def passed_over(self, checkpoint, reason):
        self.of.append((checkpoint, reason))


class Handler(RecoverHandler):
    """A RecoverHandler of one box, with the warnings that it gave."""

    def __init__(self, run, attempt=9, **tree):
        self.box, journal = Box(**(tree or {"weight": torch.zeros(2), "step_of_box": 0})), Warnings()
        self.warnings, ranks = journal.of, Ranks()
        super().__init__(
            Catalog(run), {"box": self.box}, SyncWriter(ranks), journal, attempt, {"world_size": 1}, ranks, SavePolicy()
        )


def test_names_say_step_and_attempt():
    assert Catalog.name(100, 2) == "step-00000100.a2"
    assert Catalog.name(123456789, 10) == "step-123456789.a10"


def test_a_later_attempt_is_newer_whatever_the_step(run):
    for name in ("step-00000100.a2", "step-00000300.a1", "step-00000050.a10", "step-00000200.a2", "step-123456789.a1"):
        run.sub(name).make()
    assert [name for _, _, name in Catalog(run).names()] == [
        "step-00000050.a10",
        "step-00000200.a2",
        "step-00000100.a2",
        "step-123456789.a1",
        "step-00000300.a1",
    ]
    assert Catalog(run).last_attempt() == 10


def test_other_names_are_no_checkpoints(run):
    for name in ("step-1.a1", "step-00000001", "step-00000001.a1.tmp", "checkpoint_000001", "events.jsonl"):
        run.sub(name).make()
    assert Catalog(run).names() == []
    assert Catalog(run).last_attempt() == 0
    assert Catalog(run).newest() is None


def test_the_newest_has_its_manifest(run):
    saved(run, 10)
    saved(run, 20)
    newest = Catalog(run).newest()
    assert (newest.name, newest.step, newest.attempt, newest.problem) == ("step-00000020.a1", 20, 1, None)
    assert newest.manifest.info == {"step": 20, "attempt": 1}


def test_a_directory_without_manifest_is_never_the_newest(run):
    saved(run, 10)
    saved(run, 20)
    run.sub("step-00000030.a1").make()
    entries = list(Catalog(run).entries())
    assert [entry.name for entry in entries] == ["step-00000030.a1", "step-00000020.a1", "step-00000010.a1"]
    assert entries[0].manifest is None
    assert "never finished" in entries[0].problem
    assert Catalog(run).newest().name == "step-00000020.a1"
    assert Catalog(run).last_attempt() == 1


def test_a_copy_under_another_name_is_not_taken_for_a_checkpoint(run):
    original = saved(run, 10)
    shutil.copytree(original.location, f"{run.location}/step-00000020.a1")
    assert Catalog(run).newest().name == "step-00000010.a1"
    assert next(Catalog(run).entries()).problem == "manifest.json: belongs to another checkpoint"


def test_the_catalog_looks_anew_each_time(run):
    catalog = Catalog(run)
    assert catalog.newest() is None
    directory = saved(run, 10)
    assert catalog.newest().step == 10
    directory.delete()
    assert catalog.newest() is None


def test_a_dump_is_named_described_and_restored(run):
    handler = Handler(run, attempt=3, weight=torch.tensor([1.0, 2.0]), step_of_box=40)
    dump = handler.save(40, {"loss": 0.5})
    assert (dump.name, dump.step) == ("step-00000040.a3", 40)
    manifest = Catalog(run).newest().manifest
    assert manifest == dump.manifest.result()
    assert (manifest.info["world_size"], manifest.info["step"], manifest.info["attempt"]) == (1, 40, 3)
    later = Handler(run)
    assert later.load() == "step-00000040.a3"
    assert later.box.tree["weight"].tolist() == [1.0, 2.0]
    assert later.box.tree["step_of_box"] == 40
    assert later.warnings == []


def test_without_checkpoints_nothing_is_restored(run):
    handler = Handler(run)
    assert handler.load() is None
    assert handler.box.tree["step_of_box"] == 0
    assert handler.warnings == []


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_next_older_good_one_is_restored_with_a_warning(run, kind):
    saved(run, 10)
    saved(run, 20)
    name = do_damage(saved(run, 30), kind)
    handler = Handler(run)
    assert handler.load() == "step-00000020.a1"
    assert handler.box.tree["weight"].tolist() == [20.0, 20.0]
    assert handler.box.tree["step_of_box"] == 20
    ((checkpoint, reason),) = handler.warnings
    assert checkpoint == "step-00000030.a1"
    assert name in reason


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if kind != "manifest deleted"])
def test_it_is_an_error_if_all_are_damaged(run, kind):
    for step in (10, 20):
        do_damage(saved(run, step), kind)
    handler = Handler(run)
    with pytest.raises(RuntimeError, match="none of the 2 checkpoints of this run can be read; not starting over"):
        handler.load()
    assert [checkpoint for checkpoint, _ in handler.warnings] == ["step-00000020.a1", "step-00000010.a1"]


def test_saves_that_never_finished_are_no_reason_not_to_start_over(run):
    for step in (10, 20):
        do_damage(saved(run, step), "manifest deleted")
    handler = Handler(run)
    assert handler.load() is None
    assert [checkpoint for checkpoint, _ in handler.warnings] == ["step-00000020.a1", "step-00000010.a1"]


class FullDisk(LocalStorage):
    """Has no room left for more than half of a manifest."""

    def sub(self, name):
        return FullDisk(super().sub(name).location)

    @contextmanager
    def create(self, name):
        with super().create(name) as file:
            if name != "manifest.json":
                yield file
                return
            file.write(b'{\n "checksum": "0')
            raise OSError(28, "No space left on device")

    def replace(self, name, data):
        raise OSError(28, "No space left on device")


def test_a_first_save_that_a_full_disk_cut_off_is_no_reason_not_to_start_over(run):
    dump = Handler(FullDisk(run.location)).save(10, {})
    assert "No space left" in str(dump.manifest.exception())
    assert Handler(run).load() is None


def test_a_checkpoint_of_another_model_is_an_error_and_not_passed_over(run):
    saved(run, 10)
    save_box(run.location, 20, weight=torch.zeros(3), step_of_box=20)
    handler = Handler(run)
    with pytest.raises(ValueError, match=r"box\.weight is \(3,\) in it and \(2,\) here"):
        handler.load()
    assert handler.warnings == []
