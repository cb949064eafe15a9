"""Failures of `begin`: what all ranks agreed on is the outcome of the save, everything else is raised at once."""

import resource
from contextlib import closing

import pytest
import torch

from areal_ray.checkpoint.format.shard_file import ShardImage
from areal_ray.checkpoint.writer import AsyncWriter, SyncWriter
from areal_ray.distributed import RankError, Ranks
from areal_ray.storage import LocalStorage

from .boxes import Box, weights

pytestmark = pytest.mark.unit


@pytest.fixture(params=["sync", "async"])
def writer(request):
    with closing(SyncWriter(Ranks()) if request.param == "sync" else AsyncWriter(Ranks(), Ranks())) as writer:
        yield writer


def begin(writer, path, **tree):
    return writer.begin(LocalStorage(path), {"box": Box(**tree)}, {"step": 1})


def test_a_copy_that_fails_on_this_rank_alone_is_raised_at_once(writer, tmp_path, monkeypatch):
    def fill(image, parts, whole):
        raise RuntimeError("out of memory, here only")

    monkeypatch.setattr(ShardImage, "fill", fill)
    with pytest.raises(RuntimeError, match="here only"):
        begin(writer, tmp_path / "one", **weights())


def test_state_that_is_no_json_is_raised_at_once(writer, tmp_path):
    with pytest.raises(TypeError):
        begin(writer, tmp_path / "one", **weights(), value=object())


def test_a_failure_of_all_ranks_is_the_outcome_and_the_next_save_works(writer, tmp_path):
    (tmp_path / "there").mkdir()
    failed = begin(writer, tmp_path / "there", **weights())
    assert isinstance(failed.exception(60), RankError)
    assert begin(writer, tmp_path / "next", **weights()).result(60).files


def test_that_memory_is_not_pinned_is_said_with_the_first_save_only(tmp_path, monkeypatch):
    make = ShardImage.__init__

    def not_pinned(image, *args, **kwargs):
        make(image, *args, **kwargs)
        image.not_pinned = "CUDA cannot lock 1.0 GB of memory"

    monkeypatch.setattr(ShardImage, "__init__", not_pinned)
    said = []
    with closing(SyncWriter(Ranks(), said.append)) as writer:
        for name in ("one", "two"):
            assert begin(writer, tmp_path / name, **weights()).result(60).files
    assert said == ["saves keep training waiting while they copy: rank 0: CUDA cannot lock 1.0 GB of memory"]


def faults():
    """Pages that this thread had to wait for."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def test_the_first_save_that_was_prepared_finds_its_memory_made(tmp_path):
    tree = {"weight": torch.ones(8 << 20, dtype=torch.uint8)}  # 2,048 pages
    with closing(AsyncWriter(Ranks(), Ranks())) as writer:
        writer.prepare({"box": Box(**tree)})
        writer._capture._image.result(60)
        before = faults()
        saved = begin(writer, tmp_path / "one", **tree)
        assert faults() - before < 512
        assert saved.result(60).files
