"""The account of a run's time."""

import json

import pytest

from areal_ray.run import RunDir
from areal_ray.run.goodput import goodput, table
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path):
    return RunDir(LocalStorage(tmp_path))


def ledger(run, *events):
    for time, kind, *fields in events:
        line = {"time": time, "event": kind, **(fields[0] if fields else {})}
        run.storage.append("events.jsonl", json.dumps(line).encode() + b"\n")


def shares(run):
    account = goodput(run)
    return account["wall_s"], account["steps_s"], account["share"]


def test_the_share_is_that_of_the_steps_that_stand(run):
    ledger(run, (1000, "submitted"), (1005, "saved", {"blocked_s": 0.5}), (1040, "saved", {"blocked_s": 0.25}))
    ledger(run, (1100, "finished"))
    run.log_metrics(0, {"held_out_loss": 5.0})
    run.log_metrics(10, {"step_time_s": 2.0, "data_s": 0.5})
    run.log_metrics(15, {"held_out_loss": 4.0})
    run.log_metrics(30, {"step_time_s": 1.5, "data_s": 0.25})
    assert shares(run) == (100, 50.0, 0.5)
    assert (goodput(run)["saves_s"], goodput(run)["data_s"]) == (0.75, 10.0)


def test_the_time_between_two_submissions_is_left_out(run):
    ledger(run, (1000, "submitted"), (1010, "stopped"), (5000, "submitted"), (5030, "finished"))
    run.log_metrics(10, {"step_time_s": 1.0})
    assert shares(run) == (40, 10.0, 0.25)


def test_a_run_that_never_was(run):
    assert shares(run) == (0, 0, None)
    assert goodput(run)["attempts"] == []


START = {"start_s": 0.5, "imports_s": 4.5, "process_group_s": 1.0}
WORK = {"connect_s": 0.125, "build_s": 0.5, "data_s": 0.25, "load_s": 0.75, "first_step_s": 2.0}
FIRST = [
    (1, "submitted"),
    (2, "group", START),
    (3, "attempt", {"attempt": 1}),
    (4, "started", {"step": 0}),
    (5, "training", {"step": 1, **WORK}),
]
FAILED = {"rank": 1, "cause": "it died", "step": 13, "detection_s": 0.3}
AGAIN = {"teardown_s": 0.1, "start_s": 0.1, "imports_s": 0.3, "process_group_s": 0.2}


def test_every_start_has_its_reason_its_phases_and_the_steps_that_were_lost(run):
    ledger(run, *FIRST, (10, "failure", FAILED), (11, "group", AGAIN), (12, "attempt", {"attempt": 2}))
    ledger(run, (13, "restored", {"step": 8}), (14, "training", {"step": 9, **WORK, "load_s": 3.0}))
    first, second = goodput(run)["attempts"]
    assert first == {"attempt": 1, "after": "submitted", "lost_steps": None, **START, **WORK}
    phases = {**AGAIN, **WORK, "load_s": 3.0, "detection_s": 0.3}
    assert second == {"attempt": 2, "after": "worker 1: it died", "lost_steps": 4, **phases}
    assert goodput(run)["lost_steps"] == 4


def test_a_start_that_failed_itself_stands_with_what_is_known(run):
    ledger(run, *FIRST, (10, "failure", FAILED), (11, "group", AGAIN), (12, "attempt", {"attempt": 2}))
    ledger(run, (13, "controller_died"), (14, "group", START), (15, "attempt", {"attempt": 3}))
    assert [attempt["after"] for attempt in goodput(run)["attempts"]] == [
        "submitted",
        "worker 1: it died",
        "the controller failed",
    ]


@pytest.mark.parametrize("kind", ["restored", "started"])
def test_where_nobody_could_say_how_far_it_was_the_last_line_counts(run, kind):
    ledger(run, *FIRST, (10, "failure", {**FAILED, "step": None}), (12, "attempt", {"attempt": 2}))
    ledger(run, (13, kind, {"step": 8 if kind == "restored" else 0, "reached": 20}), (14, "training", {"step": 9}))
    assert goodput(run)["lost_steps"] == (12 if kind == "restored" else 20)


def test_where_nobody_knows_how_far_it_was_the_table_does_not_say_none(run):
    ledger(run, *FIRST, (10, "failure", {**FAILED, "step": None}), (12, "attempt", {"attempt": 2}))
    ledger(run, (13, "restored", {"step": 8, "reached": 8}), (14, "training", {"step": 9}))
    account = goodput(run)
    assert account["attempts"][1]["lost_steps"] is None
    assert table(account).splitlines()[2].split()[-1] == "-"


def test_leaving_on_request_is_a_reason_and_loses_nothing(run):
    ledger(run, *FIRST, (10, "left", {"reason": "resize", "step": 7}), (12, "attempt", {"attempt": 2}))
    ledger(run, (13, "restored", {"step": 7, "reached": 5}))
    assert goodput(run)["attempts"][1]["lost_steps"] == 0
    assert goodput(run)["attempts"][1]["after"] == "resize"


def test_the_table_has_a_line_for_every_start(run):
    ledger(run, *FIRST)
    header, line = table(goodput(run)).splitlines()
    assert header.startswith(
        "attempt  after      detection  teardown  wait  start  imports  process group  launch  connect  build"
    )
    assert line.split()[:9] == ["1", "submitted", "-", "-", "-", "0.5", "4.5", "1.0", "-"]
    assert line.split()[9:] == ["0.1", "0.5", "0.2", "0.8", "2.0", "-"]
