"""Who has lost a run to a newer job, or to a newer attempt, writes nothing to it any more."""

import pickle
from concurrent.futures import Future
from contextlib import closing

import pytest

from areal_ray.checkpoint import AsyncWriter, Catalog, SyncWriter
from areal_ray.cluster.requests import taken_over
from areal_ray.distributed import RankError, Ranks
from areal_ray.run import RunDir
from areal_ray.run.fence import RunTaken
from areal_ray.run.logs.object_log import ObjectLog
from areal_ray.storage import LocalStorage
from areal_ray.train.journal import Journal
from areal_ray.train.recovery import PendingSave
from tests.unit.checkpoint.boxes import Box, weights

pytestmark = pytest.mark.unit


class Objects(LocalStorage):
    """Object storage: its files do not grow."""

    can_append = False

    def sub(self, name):
        return Objects(f"{self.location}/{name}")

    def replace(self, name, data):
        self.ensure()  # it knows no directories
        super().replace(name, data)


@pytest.fixture(params=[LocalStorage, Objects])
def storage(request, tmp_path):
    return request.param(tmp_path)


def job(storage, name):
    """A worker of a job, as it arrives there from the driver."""
    return pickle.loads(pickle.dumps(RunDir(storage, name)))  # noqa: S301  (its own)


def files(tmp_path):
    return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_job_that_was_stopped_longer_than_its_lease_writes_nothing_any_more(storage, tmp_path):
    first, second = RunDir(storage, "first"), RunDir(storage, "second")
    first.fence.take()
    worker = job(storage, "first")
    assert worker.next_attempt(0) == 1
    worker.event("attempt", attempt=1)
    worker.log_metrics(1, {"loss": 1.0})
    worker.flush()
    second.fence.take()
    before = files(tmp_path)
    writes = [
        lambda: worker.event("saved"),
        lambda: worker.note("saved", pytest.fail),
        lambda: (worker.log_metrics(2, {"loss": 1.0}), worker.flush()),
        lambda: (worker.log_samples(8, [1]), worker.flush()),
        lambda: worker.rewind_metrics(0),
        lambda: worker.next_attempt(0),
        lambda: first.write_result({}),
        lambda: first.note("failed", pytest.fail),
    ]
    for write in writes:
        with pytest.raises(RunTaken, match="another job has taken"):
            write()
    assert files(tmp_path) == before
    second.event("attempt", attempt=2)
    assert [event["attempt"] for event in second.events("attempt")] == [1, 2]


def test_workers_at_the_far_side_of_a_cut_network_are_shut_out_by_the_next_attempt(storage, tmp_path):
    RunDir(storage, "job").fence.take()
    old, new, driver = job(storage, "job"), job(storage, "job"), RunDir(storage, "job")
    for attempt, worker in enumerate((old, new), 1):
        assert worker.next_attempt(attempt - 1) == attempt
        worker.event("attempt", attempt=attempt)
    with pytest.raises(RunTaken, match="attempt 2 has taken"):
        old.event("saved")
    new.event("saved")
    driver.event("finished")


def test_lines_that_the_background_may_not_write_are_an_error_of_the_next(tmp_path):
    def refuse():
        raise RunTaken("another")

    log = ObjectLog(Objects(tmp_path), at_once=False, may_write=refuse)
    log.append({"step": 1})
    log._thread.shutdown()
    with pytest.raises(RunTaken):
        log.append({"step": 2})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_save_that_was_under_way_is_not_committed(tmp_path, kind):
    run, storage = RunDir(LocalStorage(tmp_path), "first"), LocalStorage(tmp_path)
    run.fence.take()
    ranks, check = Ranks(), run.fence.check
    writer = SyncWriter(ranks, may_commit=check) if kind == "sync" else AsyncWriter(ranks, ranks, may_commit=check)
    with closing(writer):
        assert writer.begin(storage.sub("step-00000001.a1"), {"box": Box(**weights())}, {"step": 1}).exception() is None
        RunDir(storage, "second").fence.take()
        error = writer.begin(storage.sub("step-00000002.a1"), {"box": Box(**weights())}, {"step": 2}).exception()
    assert Catalog(storage).last_committed() == "step-00000001.a1"
    assert isinstance(error, RankError)
    assert taken_over([error]).startswith("another job has taken")
    failed: Future = Future()
    failed.set_exception(error)
    # Nor does rank 0 write that down, or delete anything.
    Journal(run, 1, pytest.fail, object()).saved(PendingSave("step-00000002.a1", 2, failed), 0.0, 0.0, 0.0)


@pytest.mark.parametrize("text", [b"", b"[1]", b'{"job": 3, "attempt": "x"}', b"\xff\xfe"])
def test_a_fence_that_cannot_be_understood_shuts_nobody_out(tmp_path, text):
    (tmp_path / "fence.json").write_bytes(text)
    worker = job(LocalStorage(tmp_path), "job")
    worker.event("attempt", attempt=1)
    assert worker.next_attempt(0) == 2
    assert RunDir(LocalStorage(tmp_path)).next_attempt(0) == 3  # of no job: never refused, and shuts nobody out
    worker.event("saved")
