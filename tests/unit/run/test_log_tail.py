"""What is read of a long log, and taken back from it: its end, whatever lies there."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_ray.run import RunDir
from areal_ray.run.logs import log_lines
from areal_ray.run.logs.event_log import FileLog, ObjectLog
from areal_ray.storage import LocalStorage
from tests.unit.run.test_event_log import Objects, numbers

pytestmark = pytest.mark.unit


class Counting(LocalStorage):
    """Counts the bytes that are read and written."""

    def __init__(self, path):
        super().__init__(path)
        self.bytes = 0

    def read_range(self, name, offset, length):
        data = super().read_range(name, offset, length)
        self.bytes += len(data)
        return data

    def read(self, name):
        self.bytes += self.size(name)
        return super().read(name)

    def replace(self, name, data):
        self.bytes += len(data)
        super().replace(name, data)


@given(
    st.lists(st.sampled_from([b"", b"{}", b"torn", b"a long line" * 9, b"\r", b'{"a": 1}'])),
    st.booleans(),
    st.integers(1, 70),
)
def test_lines_come_backwards_with_their_offsets(lines, ended, block):
    data = b"\n".join(lines) + b"\n" * ended

    class Memory:
        def read_range(self, name, offset, length):
            return data[offset : offset + length]

    whole, log_lines._BLOCK_BYTES = log_lines._BLOCK_BYTES, block
    try:
        found = list(log_lines.backwards(Memory(), "log", len(data)))
    finally:
        log_lines._BLOCK_BYTES = whole
    assert [raw for _, raw in reversed(found) if raw] == [raw for raw in data.split(b"\n") if raw]
    assert all(data[offset : offset + len(raw)] == raw for offset, raw in found)
    assert [offset for offset, _ in found] == sorted((offset for offset, _ in found), reverse=True)


@pytest.fixture
def long(tmp_path):
    """Metrics of 50,000 steps, and one line that a crash tore among the last."""
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(50000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:-3], '{"step": 499', *lines[-3:]]) + "\n")
    return Counting(tmp_path)


def test_a_rewind_of_a_few_steps_reads_the_end_and_writes_nothing(long, tmp_path):
    path = tmp_path / "metrics.jsonl"
    before, file = path.read_bytes(), path.stat().st_ino
    run = RunDir(long)
    assert run.reached() == 49999
    run.rewind_metrics(49989)
    assert long.bytes < 400_000
    after = path.read_bytes()
    assert before.startswith(after)
    assert json.loads(after.splitlines()[-1])["step"] == 49989
    assert path.stat().st_ino == file  # whoever follows it goes on doing so


@pytest.mark.parametrize("step", [-1, 0, 25000, 49996, 49998, 49999, 60000])
def test_a_rewind_leaves_what_a_filter_of_all_lines_would(long, tmp_path, step):
    run = RunDir(long)
    run.rewind_metrics(step)
    assert [line["step"] for line in RunDir(LocalStorage(tmp_path)).metrics()] == list(range(min(step, 49999) + 1))
    run.log_metrics(step + 1, {})
    assert [line["step"] for line in RunDir(LocalStorage(tmp_path)).metrics()][-1] == step + 1


def test_a_line_of_an_attempt_that_was_ending_is_taken_back_from_among_others(tmp_path):
    log = FileLog(LocalStorage(tmp_path), "log.jsonl")
    for n in (*range(100), 300, 100, 301, 101, 102):
        log.append({"n": n})
    log.keep(lambda line: line["n"] <= 101)
    assert numbers(log) == list(range(102))


def test_zeros_that_a_power_cut_left_at_the_end_do_not_hide_the_lines_before(tmp_path):
    log = FileLog(LocalStorage(tmp_path), "log.jsonl")
    for n in range(10):
        log.append({"n": n})
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(bytes(300_000))
    assert log.tail()[-1] == {"n": 9}
    log.keep(lambda line: line["n"] < 5)
    log.append({"n": 5})
    assert numbers(log) == list(range(6))


class Looked(Objects):
    """Notes which objects were read."""

    def read(self, name):
        self.seen.append(name)
        return super().read(name)


def test_of_objects_the_newest_are_read_until_one_stays_as_it_is(tmp_path):
    storage = Looked(tmp_path / "log")
    storage.seen = []
    log = ObjectLog(storage, at_once=True, part_bytes=20)
    for n in range(90):
        log.append({"n": n})
    names = storage.names()
    assert log.tail()[-1] == {"n": 89}
    assert storage.seen == names[-1:]
    storage.seen.clear()
    log.keep(lambda line: line["n"] < 80)
    assert storage.seen[::-1] == names[-len(storage.seen) :]
    assert len(storage.seen) < 6
    assert numbers(log) == list(range(80))


def test_an_object_is_newer_than_those_of_a_node_whose_clock_is_ahead(tmp_path, monkeypatch):
    storage = Objects(tmp_path / "log")
    for clock, steps, restored in ((2000.0, range(5), 0), (1000.0, range(3, 8), 3), (1500.0, range(6, 9), 6)):
        monkeypatch.setattr("time.time", lambda clock=clock: clock)
        log = ObjectLog(storage, at_once=True)
        log.keep(lambda line, restored=restored: line["n"] < restored)
        for n in steps:
            log.append({"n": n})
    assert numbers(log) == list(range(9))
