"""Logs that a disk, a crash or a foreign hand has changed: no line of them blocks a resume, or lowers the attempt."""

import json
import os
import random

import pytest

from areal_ray.run import RunDir
from areal_ray.run.goodput import goodput
from areal_ray.run.lease import hold_lease
from areal_ray.run.logs import log_lines
from areal_ray.storage import LocalStorage, obstacles
from tests.unit.run.test_event_log import Objects

pytestmark = pytest.mark.unit

FOREIGN = [
    b"5",
    b"null",
    b"[]",
    b"{}",
    b'"event"',
    b'{"event": 7}',
    b'{"time": 1.0, "event": "attempt"}',
    b'{"time": 1.0, "event": "attempt", "attempt": "3"}',
    b'{"time": 1.0, "event": "attempt", "attempt": -3}',
    b'{"time": 1.0, "event": "attempt", "attempt": true}',
    b'{"time": "now", "event": "failure", "rank": 0, "cause": "x", "error": "", "where": null}',
    b'{"time": 1.0, "event": "failure", "rank": "0", "cause": "x"}',
    b'{"time": 1.0, "event": "bad_step", "step": null, "action": "skip"}',
    b'{"time": 1.0, "event": "training", "attempt": 1, "step": 1, "build_s": "long"}',
    b'{"time": 1.0, "event": "saved", "checkpoint": 7}',
    b'{"time": 1.0, "event": "attempt", "atte',
    b"[" * 100_000,
    b"\0" * 5000,
    b"\xff\xfe",
]
METRICS = [b"7", b'{"step": "1"}', b'{"loss": 1.0}', b'{"step": 1, "step_time_s": []}', b'{"step": -1}']


def tell(run, attempts=3):
    for attempt in range(1, attempts + 1):
        run.event("submitted", last_step=9, submission="x")
        run.event("attempt", attempt=attempt, world_size=1, nodes=["a"], pids=[1])
        run.event("started", attempt=attempt, step=0, reached=0)
        run.event("training", attempt=attempt, step=1, build_s=1.0)
        run.event("saved", attempt=attempt, step=5, checkpoint=f"step-00000005.a{attempt}", blocked_s=0.1)
        run.event("bad_step", attempt=attempt, step=4, action="skip")
        run.event("failure", rank=0, cause="x", error="y", where=None, step=7)
        run.log_metrics(attempt, {"loss": 1.0, "step_time_s": 0.1})
    run.flush()


def read_all(run):
    """All that a start and the end of a run ask for."""
    attempt = run.next_attempt(0)
    goodput(run)
    run.reached()
    run.rewind_metrics(2)
    run.rewind_samples(0)
    assert all(type(event["attempt"]) is int for event in run.turning_points() if event["event"] == "attempt")
    return attempt


@pytest.mark.parametrize("line", FOREIGN, ids=lambda line: repr(line[:60]))
def test_a_foreign_line_in_the_ledger_is_left_out_and_said_once(tmp_path, line):
    run = RunDir(LocalStorage(tmp_path))
    tell(run)
    before = list(run.each_event())
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(line + b"\n")
    tell(RunDir(LocalStorage(tmp_path)), 0)
    later = RunDir(LocalStorage(tmp_path))
    assert read_all(later) == 4
    assert list(later.each_event()) == before
    (said,) = later.damage()
    assert "events.jsonl: 1 line cannot be read and is left out" in said
    assert later.damage() == []
    again = RunDir(LocalStorage(tmp_path))  # a restart: the index says how far it was read
    assert again.next_attempt(0) == 5
    assert again.damage() == []


@pytest.mark.parametrize("line", METRICS)
def test_a_foreign_line_in_the_metrics_is_left_out(tmp_path, line):
    run = RunDir(LocalStorage(tmp_path))
    tell(run)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(line + b"\n")
    assert read_all(RunDir(LocalStorage(tmp_path))) == 4
    assert [each["step"] for each in run.metrics()] == [1, 2]


def test_what_lies_in_the_folder_of_the_objects_is_no_log(tmp_path):
    run = RunDir(Objects(tmp_path))
    tell(run)
    (tmp_path / "events" / "notes.txt").write_bytes(b"mine")
    (tmp_path / "events" / "9.0-ab.jsonl.d").mkdir()
    assert read_all(RunDir(Objects(tmp_path))) == 4


def test_one_flipped_bit_anywhere_blocks_nothing_and_lowers_no_attempt(tmp_path):
    run = RunDir(LocalStorage(tmp_path))
    tell(run)
    assert run.next_attempt(0) == 4  # leaves an index
    run.event("attempt", attempt=4, world_size=1, nodes=["a"], pids=[1])
    whole = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    chosen = random.Random(7)
    for _ in range(400):
        for name, data in whole.items():
            (tmp_path / name).write_bytes(data)
        name = chosen.choice(sorted(whole))
        data = bytearray(whole[name])
        bit = chosen.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(data)
        assert read_all(RunDir(LocalStorage(tmp_path))) >= 5, (name, bit)


def test_a_lost_ledger_lowers_no_attempt(tmp_path):
    run = RunDir(LocalStorage(tmp_path))
    for _ in range(3):
        attempt = run.next_attempt(0)
        run.event("attempt", attempt=attempt)
    (tmp_path / "events.jsonl").unlink()
    assert RunDir(LocalStorage(tmp_path)).next_attempt(0) == 4


@pytest.mark.parametrize("text", ["[]", "5", '{"seen": 3, "events": []}', '{"seen": {}, "events": [1]}', "[" * 9000])
def test_an_index_of_other_types_does_not_matter(tmp_path, text):
    tell(RunDir(LocalStorage(tmp_path)))
    (tmp_path / "events.index.json").write_text(text)
    assert read_all(RunDir(LocalStorage(tmp_path))) == 4


def test_a_line_without_end_is_passed_by(tmp_path, monkeypatch):
    monkeypatch.setattr(log_lines, "_LINE_BYTES", 1000)
    monkeypatch.setattr(log_lines, "_SCAN_BYTES", 1000)
    monkeypatch.setattr(log_lines, "_BLOCK_BYTES", 100)
    run = RunDir(LocalStorage(tmp_path))
    tell(run)
    for name in ("events.jsonl", "metrics.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(b"\0" * 5500)
    tell(RunDir(LocalStorage(tmp_path)), 1)
    later = RunDir(LocalStorage(tmp_path))
    assert later.reached() == 3
    assert [event["attempt"] for event in later.each_event() if event["event"] == "attempt"] == [1, 2, 3, 1]
    assert read_all(later) == 4


@pytest.mark.parametrize("holder", [5, [1], {}, {"id": 3}, [["id", 1]], {"id": "a", "pid": "x"}, {"id": "a", "pid": 0}])
def test_a_lease_of_other_types_is_nobodys_or_waited_for(tmp_path, holder):
    (tmp_path / "driver.json").write_text(json.dumps(holder))
    with hold_lease(LocalStorage(tmp_path), list, lambda _: None, renew_s=0.01, expires_s=0.05, settle_s=0.0):
        assert json.loads((tmp_path / "driver.json").read_text())["pid"] == os.getpid()


OWN = ["driver.json", "events.jsonl", "metrics.jsonl", "samples.jsonl", "config.yaml", "result.json"]
OWN += ["events.index.json", "checkpoints.json", "checkpoint_manager_snapshot.json"]
IN_THE_WAY = {
    "directory": lambda path: path.mkdir(),
    "FIFO": os.mkfifo,
    "link that leads out": lambda path: path.symlink_to("/etc/hostname"),
    "loop": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", IN_THE_WAY)
@pytest.mark.parametrize("name", OWN)
def test_what_is_no_file_is_set_aside_and_said(tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr(obstacles, "_AGAIN_S", 0.0)
    IN_THE_WAY[kind](tmp_path / name)
    was, said = os.lstat(tmp_path / name).st_ino, []
    run = RunDir(LocalStorage(tmp_path))
    with hold_lease(run.storage, list, said.append, settle_s=0.0):
        run.clear(said.append)
    (line,) = said
    assert f"{name} cannot be read" in line
    (aside,) = tmp_path.iterdir()
    assert aside.name in line
    assert os.lstat(aside).st_ino == was
    tell(run)
    assert read_all(run) == 4


class Refusing(LocalStorage):
    """Whose ledger cannot be read, so many times."""

    times = 0

    def open(self, name):
        if name == "events.jsonl" and self.times:
            self.times -= 1
            raise OSError(5, "Input/output error")
        return super().open(name)


def test_an_error_that_passes_is_waited_for_and_one_that_stays_costs_no_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr(obstacles, "_AGAIN_S", 0.0)
    storage = Refusing(tmp_path)
    run, said = RunDir(storage), []
    tell(run)
    assert run.next_attempt(0) == 4
    storage.times = 1
    run.clear(said.append)
    assert said == []
    storage.times = 2
    run.clear(said.append)
    (line,) = said
    assert "events.jsonl cannot be read (Input/output error): set aside as events.jsonl.aside-" in line
    assert RunDir(storage).next_attempt(0) == 5
