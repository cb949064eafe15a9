"""Failures of `begin`: what all ranks agreed on is the outcome of the save, everything else is raised at once."""

from contextlib import closing

import pytest

from areal_ray.checkpoint.shard_file import ShardImage
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
    def fill(image, parts):
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
