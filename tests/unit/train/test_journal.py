"""What the journal does when a save has ended."""

from concurrent.futures import Future

import pytest

from areal_ray.checkpoint import Catalog
from areal_ray.checkpoint.retention import Retention
from areal_ray.config import KeepConfig
from areal_ray.distributed import RankError
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.train.journal import Journal, retention
from areal_ray.train.recovery import PendingSave
from tests.unit.checkpoint.boxes import save_box

pytestmark = pytest.mark.unit

NAME = "step-00000004.a1"


@pytest.fixture
def run(tmp_path):
    return RunDir(LocalStorage(tmp_path))


@pytest.fixture
def said():
    return []


@pytest.fixture
def journal(run, said):
    return Journal(run, 1, said.append, retention(run, 1, said.append, Catalog(run.storage), KeepConfig()))


def failed(error):
    manifest = Future()
    manifest.set_exception(error)
    return PendingSave(NAME, 4, manifest)


def test_what_a_failed_save_left_is_deleted(journal, run):
    run.storage.sub(NAME).make()
    journal.saved(failed(RankError([(1, "OSError: full", ["OSError"])])), 0.1, 0.0, 0.2)
    assert not run.storage.sub(NAME).names()
    assert [event["event"] for event in run.events()] == ["save_failed"]


def test_a_failed_save_is_in_the_ledger_even_if_what_it_left_cannot_be_deleted(journal, run, monkeypatch):
    def away(*_):
        raise ConnectionError("storage is away")

    monkeypatch.setattr(Retention, "discard", away)
    with pytest.raises(ConnectionError):
        journal.saved(failed(RankError([(1, "OSError: full", ["OSError"])])), 0.1, 0.0, 0.2)
    assert [event["event"] for event in run.events()] == ["save_failed"]


def test_a_checkpoint_that_was_committed_before_a_rank_died_stays(journal, run, tmp_path):
    save_box(tmp_path, step=4)
    journal.saved(failed(RuntimeError("Connection closed by peer")), 0.1, 0.0, 0.2)
    newest = Catalog(run.storage).newest()
    assert newest is not None
    assert newest.name == NAME


def test_a_ledger_that_cannot_be_written_is_said_and_made_up_for(journal, run, said, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(LocalStorage, "append", full)
        journal.skipped(8)
    assert any("could not write to the ledger" in line for line in said)
    journal.skipped(12)
    assert [event["step"] for event in run.events("save_skipped")] == [8, 12]


def test_only_what_a_save_of_this_run_began_is_cleaned_up(journal, run, said):
    run.event("attempt", attempt=1, marks_saves=True)
    run.event("attempt", attempt=2)  # of a version that did not mark its saves
    journal.begins("step-00000004.a1", 4)
    left = ["step-00000008.a1", "step-00000004.a3"]  # copied here by hand: the one marks, the other is of no attempt
    for name in ("step-00000004.a1", "step-00000006.a2", *left):
        run.storage.sub(name).make()
    retention(run, 9, said.append, Catalog(run.storage), KeepConfig()).clean_up(9)
    assert sorted(run.storage.directories("step-")) == sorted(left)
    assert said == [
        "cleaned up saves of earlier attempts that were never finished: step-00000006.a2, step-00000004.a1",
        "left as it is, without a manifest and begun by no save of this run: step-00000004.a3, step-00000008.a1",
    ]


def test_what_was_in_the_way_of_a_save_is_not_deleted(journal, run):
    run.storage.sub(NAME).make()
    journal.saved(failed(RankError([(0, "FileExistsError: exists", ["FileExistsError", "OSError"])])), 0.1, 0.0, 0.2)
    assert run.storage.directories("step-") == [NAME]
