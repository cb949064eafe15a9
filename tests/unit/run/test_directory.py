"""The run directory's files, as whole as a crash leaves them; and the goodput that they add up to."""

import pytest

from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit


def test_a_run_exists_once_something_is_in_its_directory(tmp_path):
    run = RunDir(LocalStorage(tmp_path / "run"))
    assert not run.exists()
    run.storage.make()
    assert not run.exists()
    run.write_config("a: 1\n")
    assert run.exists()
    assert run.storage.read("config.yaml") == b"a: 1\n"


def test_events_come_back_in_order_and_by_kind(run):
    run.event("submitted", last_step=10)
    run.event("attempt", attempt=1)
    run.event("attempt", attempt=2)
    assert [event["event"] for event in run.events()] == ["submitted", "attempt", "attempt"]
    assert [event["attempt"] for event in run.events("attempt")] == [1, 2]
    times = [event["time"] for event in run.events()]
    assert times == sorted(times)
    assert times[0] > 1.7e9


def test_without_files_there_is_nothing_to_read(run):
    assert (run.events(), run.metrics(), run.result()) == ([], [], None)


def test_a_torn_line_is_passed_over(run):
    run.event("attempt", attempt=1)
    run.storage.append("events.jsonl", b'{"time": 1, "event": "atte')
    assert [event["attempt"] for event in run.events()] == [1]


def test_an_event_after_a_torn_line_is_not_lost(run):
    run.storage.append("events.jsonl", b'{"time": 1, "event": "atte')
    run.event("submitted")  # the driver's first act, before any worker asks for an attempt
    assert [event["event"] for event in run.events()] == ["submitted"]


def test_the_line_of_a_step_after_a_torn_one_is_not_lost(run):
    run.log_metrics(10, {"loss": 2.0})
    run.storage.append("metrics.jsonl", b'{"step": 20, "lo')
    run.rewind_metrics(10)
    run.log_metrics(20, {"loss": 1.0})
    assert run.metrics() == [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}]


def test_attempts_count_on_from_the_ledger(run):
    assert run.next_attempt(last_saved=0) == 1
    run.event("attempt", attempt=1)
    run.event("attempt", attempt=2)
    assert run.next_attempt(last_saved=1) == 3


def test_attempts_count_on_from_the_checkpoints_if_the_ledger_is_lost(run):
    assert run.next_attempt(last_saved=4) == 5


def test_the_next_attempt_is_counted_after_a_torn_line(run):
    run.event("attempt", attempt=1)
    run.storage.append("events.jsonl", b'{"time": 1, "event": "fail')
    assert run.next_attempt(last_saved=0) == 2
    run.event("attempt", attempt=2)
    assert run.next_attempt(last_saved=0) == 3


def test_rewinding_takes_back_the_lines_after_the_step(run):
    for step in (0, 10, 20, 30):
        run.log_metrics(step, {"loss": 1.0 / 3 + step})
    kept = run.metrics()[:3]
    assert run.reached() == 30
    run.rewind_metrics(20)
    assert run.metrics() == kept
    run.log_metrics(30, {"loss": 7.0})
    assert run.metrics() == [*kept, {"step": 30, "loss": 7.0}]


def test_rewinding_without_metrics_makes_none(run):
    run.rewind_metrics(10)
    assert run.reached() == 0
    assert run.storage.names() == []


def test_a_result_comes_back_and_replaces_the_one_before(run):
    run.write_result({"status": "stopped"})
    run.write_result({"status": "finished", "loss": None})
    assert run.result() == {"status": "finished", "loss": None}
