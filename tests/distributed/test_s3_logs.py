"""Events and metrics in object storage, where nothing can be appended to."""

from __future__ import annotations

import pytest

from areal_ray.run import RunDir
from areal_ray.run.logs.event_log import ObjectLog
from areal_ray.storage import Storage, storage_at
from tests.distributed.s3 import DOWN, outage
from tests.s3_server import S3Server

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_events_of_two_processes_are_merged_by_time(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1, 100))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    driver, worker = RunDir(storage), RunDir(storage)
    for n, run in enumerate((driver, worker, worker, driver, worker)):
        run.event("one" if run is driver else "two", n=n)
    assert len(storage.sub("events").names()) == 2
    for run in (driver, worker, RunDir(storage)):
        assert [event["n"] for event in run.events()] == [0, 1, 2, 3, 4]
    assert [event["n"] for event in driver.events("two")] == [1, 2, 4]


def test_metrics_written_in_the_background_are_there_after_flush(storage: Storage) -> None:
    run = RunDir(storage)
    for step in range(50):
        run.log_metrics(step, {"loss": 1.0 / (step + 1)})
    run.flush()
    assert RunDir(storage).metrics() == [{"step": step, "loss": 1.0 / (step + 1)} for step in range(50)]
    assert len(storage.sub("metrics").names()) == 1


def test_after_restarts_each_step_stands_once(storage: Storage) -> None:
    for first, end in ((0, 6), (3, 9), (5, 8), (0, 4)):
        run = RunDir(storage)
        run.rewind_metrics(first - 1)
        for step in range(first, end):
            run.log_metrics(step, {"by": end})
        run.flush()
        steps = [line["step"] for line in run.metrics()]
        assert steps == list(range(end))
    assert {line["by"] for line in run.metrics()} == {4}
    assert len(storage.sub("metrics").names()) == 1  # what nothing is left of is removed


def test_steps_taken_back_do_not_return_with_the_next_line(storage: Storage) -> None:
    log = ObjectLog(storage.sub("metrics"), at_once=True)
    for step in (0, 10, 20, 30):
        log.append({"step": step})
    log.keep(lambda line: line["step"] <= 20)
    log.append({"step": 30})
    assert [line["step"] for line in log.lines()] == [0, 10, 20, 30]


def test_a_line_that_the_server_was_down_for_goes_with_the_next(impatient: None, server: S3Server, uri: str) -> None:
    run = RunDir(storage_at(uri, server.options))
    run.event("before")
    run.log_metrics(1, {})
    run.flush()
    with outage(server):
        with pytest.raises(OSError, match=DOWN):
            run.event("during")
        run.log_metrics(2, {})
        with pytest.raises(OSError, match=DOWN):
            run.flush()
    run.event("after")
    run.log_metrics(3, {})
    run.flush()
    assert [event["event"] for event in run.events()] == ["before", "during", "after"]
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]


def test_a_long_log_goes_on_in_another_object(storage: Storage) -> None:
    log = ObjectLog(storage.sub("events"), at_once=True, part_bytes=150)
    for n in range(10):
        log.append({"time": float(n), "event": "numbered", "n": n, "text": "as long as the line of an event"})
    assert len(storage.sub("events").names()) > 2
    assert max(storage.sub("events").sizes().values()) < 250
    assert [event["n"] for event in RunDir(storage).events()] == list(range(10))
