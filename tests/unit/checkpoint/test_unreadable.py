"""Checkpoints with a file that cannot be read, or that is none: the next older is taken, and nothing is deleted."""

import os
import shutil

import pytest
import torch

from areal_ray.checkpoint import Catalog, reader
from areal_ray.checkpoint.retention import Retention
from areal_ray.config import KeepConfig
from areal_ray.distributed import RankError
from areal_ray.storage import LocalStorage

from .boxes import save_box
from .test_catalog import Handler, saved

pytestmark = pytest.mark.unit

FILES = ["manifest.json", "layout.json", "state.json", "shard-00000.sums", "shard-00000.distcp"]


def directory(path):
    path.unlink()
    path.mkdir()


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def link_out(path):
    shutil.move(path, path.parents[2] / "outside")
    path.symlink_to(path.parents[2] / "outside")


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


IN_PLACE = {"directory": directory, "FIFO": fifo, "link that leads out": link_out, "loop": loop}


class Refusing(LocalStorage):
    """Cannot open one file of one checkpoint, so many times."""

    refused, error, times = "", 5, [0]

    def sub(self, name):
        return type(self)(super().sub(name).location)

    def _inside(self, name):
        path = super()._inside(name)
        if path.endswith(self.refused) and self.times[0]:
            self.times[0] -= 1
            raise OSError(self.error, os.strerror(self.error), path)
        return path


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(reader, "AGAIN_S", 0.0)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    run = LocalStorage(tmp_path / "run")
    for step in (10, 20, 30):
        saved(run, step)
    return run


def clean_up(run):
    """What a start and the saves after it delete."""
    deleted, said = [], []
    kept = Retention(Catalog(run), KeepConfig(last=1), lambda: {"step-00000030.a1"}, deleted.append, said.append)
    kept.clean_up(9)
    kept.discard("step-00000030.a1")
    kept.apply()
    return deleted


def passed_over(run, why):
    handler = Handler(run)
    assert handler.load() == "step-00000020.a1"
    assert handler.box.tree["weight"].tolist() == [20.0, 20.0]
    ((checkpoint, reason),) = handler.warnings
    assert checkpoint == "step-00000030.a1"
    assert why in reason
    assert "\n" not in reason


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_passed_over_and_left(run, tmp_path, name, kind):
    path = tmp_path / "run" / "step-00000030.a1" / name
    IN_PLACE[kind](path)
    at = os.lstat(path).st_ino
    passed_over(run, name)
    assert Catalog(run).last_committed() == "step-00000030.a1"
    assert "step-00000030.a1" not in clean_up(run)
    assert os.lstat(path).st_ino == at


@pytest.mark.parametrize("kind", ["link that leads out", "loop"])
def test_a_directory_that_is_a_link_is_passed_over_and_left(run, tmp_path, kind):
    path = tmp_path / "run" / "step-00000030.a1"
    shutil.move(path, tmp_path / "moved")
    path.symlink_to(tmp_path / "moved" if kind == "link that leads out" else path)
    passed_over(run, "the directory" if kind == "link that leads out" else "cannot be read")
    assert "step-00000030.a1" not in clean_up(run)
    assert path.is_symlink()
    assert len(os.listdir(tmp_path / "moved")) == len(FILES) + 1


@pytest.mark.parametrize("error", [5, 13])
@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_read_is_tried_again_then_passed_over_and_left(run, monkeypatch, name, error):
    storage = Refusing(run.location)
    for attribute, value in {"refused": f"30.a1/{name}", "error": error, "times": [1]}.items():
        monkeypatch.setattr(Refusing, attribute, value)
    assert Handler(storage).load() == "step-00000030.a1"
    monkeypatch.setattr(Refusing, "times", [1000])
    passed_over(storage, f"{name}: cannot be read ({os.strerror(error)})")
    assert "step-00000030.a1" not in clean_up(storage)
    monkeypatch.setattr(Refusing, "times", [0])
    assert Handler(storage).load() == "step-00000030.a1"


def test_storage_that_is_away_is_no_damage(run, monkeypatch):
    for attribute, value in {"refused": "30.a1/state.json", "error": 116, "times": [1000]}.items():
        monkeypatch.setattr(Refusing, attribute, value)
    handler = Handler(Refusing(run.location))
    with pytest.raises(RankError, match="Stale file handle"):
        handler.load()
    assert handler.warnings == []


def test_a_fifo_with_somebody_at_its_other_end_is_no_file_either(run, tmp_path):
    path = tmp_path / "run" / "step-00000030.a1" / "shard-00000.distcp"
    fifo(path)
    end = os.open(path, os.O_RDWR)
    try:
        passed_over(run, "shard-00000.distcp")
    finally:
        os.close(end)


@pytest.mark.parametrize("name", ["checkpoints.json", ".reading-00ff"])
@pytest.mark.parametrize("kind", ["directory", "FIFO", "loop"])
def test_what_lies_beside_a_checkpoint_blocks_nothing(run, tmp_path, name, kind):
    path = tmp_path / "run" / ("step-00000010.a1" if name.startswith(".") else "") / name
    path.write_bytes(b"")
    IN_PLACE[kind](path)
    assert Handler(run).load() == "step-00000030.a1"
    assert len(Catalog(run).summaries()) == 3
    save_box(run.location, 40, weight=torch.zeros(2), step_of_box=40)
    clean_up(run)
