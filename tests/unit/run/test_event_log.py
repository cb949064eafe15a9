"""Logs: a line that could not be written is not lost, and what a crash tore spoils no other."""

import os

import pytest

from areal_ray.run.logs.event_log import FileLog, ObjectLog, open_log
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit


class Failing(LocalStorage):
    """Fails as often as it is told, after having written so many bytes."""

    failures, torn_after = 0, 0

    def append(self, name, data):
        if self.failures:
            self.failures -= 1
            super().append(name, data[: self.torn_after])
            raise OSError(28, "No space left on device")
        super().append(name, data)

    def replace(self, name, data):
        if self.failures:
            self.failures -= 1
            raise OSError(5, "Input/output error")
        self.ensure()
        super().replace(name, data)


class Objects(Failing):
    """As object storage: no appending."""

    can_append = False

    def sub(self, name):
        below = type(self)(self._inside(name))
        below.failures = self.failures
        return below


def numbers(log):
    return [line["n"] for line in log.lines()]


@pytest.fixture
def storage(tmp_path):
    return Failing(tmp_path)


@pytest.fixture
def log(storage):
    return FileLog(storage, "log.jsonl")


@pytest.fixture
def objects(tmp_path):
    return Objects(tmp_path / "log")


def test_lines_come_back_in_order(log):
    for n in range(3):
        log.append({"n": n})
    assert numbers(log) == [0, 1, 2]


def test_a_line_is_in_the_file_when_append_returns(storage, log):
    log.append({"n": 1})
    assert storage.read("log.jsonl") == b'{"n": 1}\n'


def test_a_line_that_cannot_be_written_raises_and_goes_with_the_next(storage, log):
    storage.failures = 1
    with pytest.raises(OSError, match="No space"):
        log.append({"n": 1})
    assert numbers(log) == []
    log.append({"n": 2})
    assert numbers(log) == [1, 2]


def test_several_lines_that_cannot_be_written_keep_their_order(storage, log):
    storage.failures = 2
    for n in (1, 2):
        with pytest.raises(OSError, match="No space"):
            log.append({"n": n})
    log.append({"n": 3})
    assert numbers(log) == [1, 2, 3]


def test_flush_writes_what_could_not_be_written(storage, log):
    storage.failures = 2
    with pytest.raises(OSError, match="No space"):
        log.append({"n": 1})
    with pytest.raises(OSError, match="No space"):
        log.flush()
    log.flush()
    log.flush()
    assert numbers(log) == [1]


def test_a_line_torn_by_a_full_disk_is_written_again_and_whole(storage, log):
    log.append({"n": 1})
    storage.failures, storage.torn_after = 1, 4
    with pytest.raises(OSError, match="No space"):
        log.append({"n": 2})
    assert storage.read("log.jsonl") == b'{"n": 1}\n{"n"'
    log.append({"n": 3})
    assert numbers(log) == [1, 2, 3]


def test_a_line_torn_by_a_crash_is_lost_alone(storage, log):
    log.append({"n": 1})
    storage.append("log.jsonl", b'{"n": 2')
    FileLog(storage, "log.jsonl").append({"n": 3})
    assert numbers(log) == [1, 3]


@pytest.mark.parametrize("kind", [FileLog, lambda storage, name: ObjectLog(storage, True)])
def test_what_is_not_wanted_is_taken_back(storage, kind):
    log = kind(storage, "log.jsonl")
    for n in range(4):
        log.append({"n": n})
    log.keep(lambda line: line["n"] % 2 == 0)
    assert numbers(log) == [0, 2]


@pytest.mark.parametrize("kind", [FileLog, lambda storage, name: ObjectLog(storage, False)])
def test_what_was_taken_back_does_not_come_again_with_the_next_line(objects, storage, kind):
    log = kind(storage if kind is FileLog else objects, "log.jsonl")
    for n in range(4):
        log.append({"n": n})
    log.keep(lambda line: line["n"] < 2)
    log.append({"n": 5})
    log.flush()
    assert numbers(log) == [0, 1, 5]


def test_a_line_that_waits_to_be_written_is_taken_back_too(storage, log):
    log.append({"n": 1})
    storage.failures = 1
    with pytest.raises(OSError, match="No space left"):
        log.append({"n": 2})
    log.keep(lambda line: line["n"] != 2)
    log.append({"n": 3})
    assert numbers(log) == [1, 3]


def test_a_storage_that_can_append_has_a_file_and_another_has_objects(tmp_path):
    assert open_log(LocalStorage(tmp_path), "log", at_once=True).location == os.path.realpath(tmp_path / "log.jsonl")
    assert open_log(Objects(tmp_path), "log", at_once=True).location == os.path.realpath(tmp_path / "log")


def test_an_object_holds_the_lines_of_one_process(objects):
    first, second = ObjectLog(objects, at_once=True), ObjectLog(objects, at_once=True)
    for n, log in enumerate((first, second, first)):
        log.append({"n": n, "time": n})
    assert len(objects.names()) == 2
    assert numbers(first) == numbers(second) == [0, 1, 2]


def test_a_long_object_is_left_and_another_begun(objects):
    log = ObjectLog(objects, at_once=True, part_bytes=20)
    for n in range(7):  # 9 bytes each, so that the third leads over 20
        log.append({"n": n})
    assert sorted(objects.sizes().values()) == [9, 27, 27]
    assert numbers(log) == list(range(7))


def test_an_object_is_not_left_before_all_of_it_is_written(objects):
    log = ObjectLog(objects, at_once=True, part_bytes=20)
    objects.failures = 5
    for n in range(5):
        with pytest.raises(OSError, match="Input/output"):
            log.append({"n": n})
    log.append({"n": 5})
    assert numbers(log) == list(range(6))


def test_a_line_that_no_object_takes_raises_and_goes_with_the_next(objects):
    log = ObjectLog(objects, at_once=True)
    log.append({"n": 1})
    objects.failures = 1
    with pytest.raises(OSError, match="Input/output"):
        log.append({"n": 2})
    assert numbers(log) == [1]
    log.append({"n": 3})
    assert numbers(log) == [1, 2, 3]


def test_in_the_background_a_failure_is_kept_for_flush(objects):
    log = ObjectLog(objects, at_once=False)
    objects.failures = 1000
    for n in range(3):
        log.append({"n": n})
    with pytest.raises(OSError, match="Input/output"):
        log.flush()
    objects.failures = 0
    log.flush()
    assert numbers(log) == [0, 1, 2]


def test_what_was_written_in_the_background_is_there_after_flush(objects):
    log = ObjectLog(objects, at_once=False)
    for n in range(200):
        log.append({"n": n})
    log.flush()
    assert numbers(log) == list(range(200))


def test_a_line_whose_sync_failed_stands_once(tmp_path, monkeypatch):
    log = FileLog(LocalStorage(tmp_path), "log.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            log.append({"n": 1})
    log.append({"n": 2})
    assert [line["n"] for line in log.lines()] == [1, 2]
