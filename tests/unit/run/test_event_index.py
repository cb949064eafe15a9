"""The index of a ledger: it answers as the ledger does, whatever has become of its file."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from areal_ray.run import RunDir
from areal_ray.run.logs.event_index import HISTORY, NEWEST, _reduce
from areal_ray.storage import LocalStorage
from tests.unit.run.test_event_log import Objects

pytestmark = pytest.mark.unit

INDEX = "events.index.json"
KINDS = [*HISTORY, *NEWEST, "stuck", "saved", "deleted"]


@pytest.fixture(params=[LocalStorage, Objects], ids=["file", "objects"])
def storage(request, tmp_path):
    return request.param(tmp_path)


def tell(run, first=0, last=300):
    """An attempt every 50 events, and a few of each kind in between."""
    for n in range(first, last):
        run.event(KINDS[n % len(KINDS)] if n % 50 else "attempt", n=n, attempt=n // 50 + 1)


def expected(run):
    """What the whole ledger says."""
    events = list(run.each_event())
    newest = {event["event"]: event for event in events}
    attempt = newest["attempt"]["attempt"]
    return [
        event
        for event in events
        if event["event"] in HISTORY
        or (event["event"] in NEWEST and event is newest[event["event"]])
        or (event["event"] == "stuck" and event["attempt"] == attempt)
    ]


def test_the_index_answers_as_the_ledger_does(storage):
    run = RunDir(storage)
    tell(run)
    assert run.turning_points() == expected(run)
    assert run.newest("attempt")["attempt"] == 6
    assert run.events("bad_step") == [event for event in run.each_event() if event["event"] == "bad_step"]
    assert INDEX not in storage.names()  # whoever only asks writes nothing


def test_an_index_of_the_beginning_is_read_on_from(storage):
    run = RunDir(storage)
    tell(run, 0, 120)
    assert run.next_attempt(0) == 4
    written = storage.read(INDEX)
    tell(run, 120, 300)
    assert storage.read(INDEX) == written
    assert RunDir(storage).turning_points() == run.turning_points() == expected(run)


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"[]", b"12", b'{"seen": {}}', b'{"seen": 3, "events": [{}]}', b"\xff"),
        *(b'{"seen": {"bytes": 9}, "events": []}', b'{"seen": {"bytes": "9", "check": 3}, "events": []}'),
        *(b'{"seen": {"bytes": 0, "check": ""}, "events": [{"event": "fault"}]}', b'{"seen": {"a": 1}, "events": []}'),
    ],
)
def test_a_torn_index_does_not_matter(storage, text):
    run = RunDir(storage)
    tell(run)
    storage.replace(INDEX, text)
    assert RunDir(storage).turning_points() == expected(run)
    assert RunDir(storage).next_attempt(0) == 7
    assert json.loads(storage.read(INDEX))["events"] == expected(run)


def test_an_index_of_another_ledger_does_not_matter(storage):
    run = RunDir(storage)
    tell(run)
    run.next_attempt(0)
    index = storage.read(INDEX)
    other = RunDir(type(storage)(f"{storage.location}/other"))
    other.storage.ensure()
    tell(other, 0, 700)
    other.storage.replace(INDEX, index)
    assert RunDir(other.storage).turning_points() == expected(other)


def test_a_ledger_that_was_edited_is_read_again(tmp_path):
    run = RunDir(LocalStorage(tmp_path))
    tell(run)
    run.next_attempt(0)
    lines = (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "events.jsonl").write_text("".join(line for line in lines if '"bad_step"' not in line))
    assert run.events("bad_step") == RunDir(run.storage).events("bad_step") == []
    assert RunDir(run.storage).turning_points() == expected(run)


def test_a_line_that_is_being_written_is_read_the_next_time(tmp_path):
    run = RunDir(LocalStorage(tmp_path))
    run.event("attempt", attempt=1)
    line = json.dumps({"time": 1.0, "event": "bad_step", "step": 5}).encode() + b"\n"
    for piece in (line[:20], line[20:-1]):
        assert run.events("bad_step") == []
        run.storage.append("events.jsonl", piece)
    assert [event["step"] for event in run.events("bad_step")] == [5]
    run.storage.append("events.jsonl", line[-1:])
    run.event("bad_step", step=6)
    assert [event["step"] for event in run.events("bad_step")] == [5, 6]


def test_a_long_attempt_keeps_the_index_up_to_date(storage, monkeypatch):
    monkeypatch.setattr("areal_ray.run.directory._INDEX_EVERY", 100)
    run = RunDir(storage)
    tell(run)
    assert json.loads(storage.read(INDEX))["events"] == expected(run)


def test_an_index_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch):
    run = RunDir(LocalStorage(tmp_path))
    tell(run)
    monkeypatch.setattr(LocalStorage, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert run.next_attempt(0) == 7


@given(st.lists(st.tuples(st.sampled_from(["attempt", "stuck", *KINDS]), st.integers(1, 4))), st.integers(0, 30))
@example([("attempt", 1), ("stuck", 2), ("attempt", 2)], 2)
def test_it_makes_no_difference_where_it_was_read_on_from(events, cut):
    lines = [{"event": kind, "attempt": attempt, "n": n} for n, (kind, attempt) in enumerate(events)]
    assert _reduce(_reduce(lines[:cut]) + lines[cut:]) == _reduce(lines)
