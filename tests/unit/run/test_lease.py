"""The lease of a run directory: a dead driver is followed, one that is alive is left alone."""

import json
import os
import secrets
import socket
import subprocess
import threading

import pytest

from areal_ray.run import lease
from areal_ray.run.lease import RunInUse, hold_lease
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit

NAME = "driver.json"
LONG = 60  # seconds after which a test has failed
NEVER = 20.0  # seconds that no test waits for, unless it fails


class Flaky(LocalStorage):
    """Storage that goes away. It counts how often it was written to, and how often anything failed."""

    def __init__(self, path):
        super().__init__(path)
        self.away, self.written, self.failed, self._changed = False, 0, 0, threading.Condition()

    def _count(self, written=0):
        with self._changed:
            self.written += written and not self.away
            self.failed += self.away
            self._changed.notify_all()
        if self.away:
            raise OSError(5, "Input/output error")

    def wait_for(self, what):
        with self._changed:
            assert self._changed.wait_for(what, LONG)

    def replace(self, name, data):
        self._count(written=1)
        super().replace(name, data)

    def read(self, name):
        self._count()
        return super().read(name)

    def remove(self, name):
        self._count()
        super().remove(name)


class Renewed(LocalStorage):
    """Storage on which a driver elsewhere renews its lease whenever one looks."""

    def read(self, name):
        return json.dumps({**json.loads(super().read(name)), "time": secrets.token_hex(4)}).encode()


@pytest.fixture
def said():
    return []


@pytest.fixture
def drive(tmp_path, said):
    """Take the lease; what is lost is told to the Event `drive.lost`."""

    def drive(run=None, expires_s=0.2):
        run = run or LocalStorage(tmp_path)
        return hold_lease(run, drive.lost.set, said.append, renew_s=0.02, expires_s=expires_s, settle_s=0.0)

    drive.lost = threading.Event()
    return drive


def held_by(folder, **fields):
    """Write the lease of another driver, by default one on another machine."""
    holder = {"id": "0123456789abcdef", "host": "elsewhere", "pid": 7, "boot": "one/1", "time": 1.0, **fields}
    (folder / NAME).write_text(json.dumps(holder))
    return holder


def holder(folder):
    return json.loads((folder / NAME).read_text())


def dead_process():
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


HERE = {"host": socket.gethostname(), "boot": lease._boot()}


def test_it_is_taken_and_released(drive, tmp_path, said):
    with drive():
        mine = holder(tmp_path)
        assert (mine["host"], mine["pid"]) == (socket.gethostname(), os.getpid())
    assert list(tmp_path.iterdir()) == []
    with drive():
        assert holder(tmp_path)["id"] != mine["id"]
    assert said == []


def test_a_run_that_fails_releases_it(drive, tmp_path):
    with pytest.raises(ZeroDivisionError), drive():
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_no_second_driver_starts_beside_one_that_is_alive(drive, tmp_path, said):
    with drive():
        first = holder(tmp_path)["id"]
        in_use = f"in use by process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(RunInUse, match=in_use), drive(expires_s=NEVER):
            pytest.fail("two drivers")
        assert holder(tmp_path)["id"] == first
        assert not drive.lost.is_set()
    (line,) = said
    assert f"{tmp_path} is in use by process {os.getpid()}" in line


def test_no_second_driver_starts_beside_one_that_is_alive_elsewhere(drive, tmp_path):
    theirs = held_by(tmp_path)
    with pytest.raises(RunInUse, match="in use by process 7 on elsewhere"), drive(Renewed(tmp_path), NEVER):
        pytest.fail("two drivers")
    assert holder(tmp_path) == theirs


def test_a_driver_elsewhere_that_is_done_meanwhile_is_followed(drive, tmp_path):

    class Done(LocalStorage):
        looks = 0

        def read(self, name):
            self.looks += 1
            if self.looks == 3:
                self.remove(name)
            return super().read(name)

    held_by(tmp_path)
    with drive(Done(tmp_path), NEVER):
        assert holder(tmp_path)["pid"] == os.getpid()


def test_that_of_a_process_which_died_here_is_taken_at_once(drive, tmp_path, said):
    held_by(tmp_path, **HERE, pid=dead_process())
    with drive(expires_s=NEVER):
        assert holder(tmp_path)["pid"] == os.getpid()
    assert said == []


@pytest.mark.parametrize(
    "fields",
    [{}, {**HERE, "pid": os.getppid()}, {**HERE, "pid": 2**30, "boot": "another/1"}],
    ids=["elsewhere", "a process here that hangs", "a container of the same host name"],
)
def test_that_of_a_driver_which_is_not_heard_of_is_waited_for_and_taken(drive, tmp_path, said, fields):
    held_by(tmp_path, **fields)
    with drive():
        assert holder(tmp_path)["pid"] == os.getpid()
    assert len(said) == 1
    assert "to see whether it is alive" in said[0]


@pytest.mark.parametrize("text", ["", '{"id": "0123', "[1, "])
def test_the_half_of_a_file_is_nobody_s(drive, tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with drive():
        assert holder(tmp_path)["pid"] == os.getpid()


def test_of_two_who_find_none_only_the_last_one_to_write_goes_on(drive, tmp_path):
    class Race(LocalStorage):
        def replace(self, name, data):
            super().replace(name, data)
            held_by(tmp_path)

    with pytest.raises(RunInUse, match="elsewhere"), drive(Race(tmp_path)):
        pytest.fail("two drivers")
    assert holder(tmp_path)["host"] == "elsewhere"


def test_it_is_renewed(drive, tmp_path):
    run = Flaky(tmp_path)
    with drive(run):
        first = holder(tmp_path)
        run.wait_for(lambda: run.written > 4)
        now = holder(tmp_path)
    assert now["time"] > first["time"]
    assert now["id"] == first["id"]


def test_who_lost_it_is_told_and_leaves_the_other_s_alone(drive, tmp_path, said):
    with drive():
        theirs = held_by(tmp_path)
        assert drive.lost.wait(LONG)
        assert holder(tmp_path) == theirs
    assert holder(tmp_path) == theirs
    assert "process 7 on elsewhere, which has taken over" in said[0]


def test_storage_that_is_away_for_a_while_takes_nothing_from_it(drive, tmp_path):
    run = Flaky(tmp_path)
    with drive(run):
        (tmp_path / NAME).unlink()
        run.away = True
        run.wait_for(lambda: run.failed > 3)
        written, run.away = run.written, False
        run.wait_for(lambda: run.written > written + 1)
        assert holder(tmp_path)["pid"] == os.getpid()
    assert not drive.lost.is_set()
    assert list(tmp_path.iterdir()) == []


def test_storage_that_is_away_at_the_end_does_not_fail_the_run(drive, tmp_path):
    run = Flaky(tmp_path)
    with drive(run):
        run.away = True
    assert (tmp_path / NAME).exists()  # it expires


def test_storage_that_is_away_at_the_beginning_is_said(drive, tmp_path):
    run = Flaky(tmp_path)
    run.away = True
    with pytest.raises(OSError, match="Input/output"), drive(run):
        pytest.fail("a driver without a lease")


@pytest.mark.parametrize(("other", "stays"), [({}, False), ({"pid": 1}, True), ({"host": "elsewhere"}, True)])
def test_a_driver_that_ends_at_once_gives_back_its_own_lease_only(tmp_path, other, stays):
    held_by(tmp_path, **{"host": socket.gethostname(), "boot": lease._boot(), "pid": os.getpid(), **other})
    lease.let_go(LocalStorage(tmp_path))
    assert (tmp_path / NAME).exists() == stays


def test_there_may_be_no_lease_to_give_back(tmp_path):
    lease.let_go(LocalStorage(tmp_path))


def test_a_run_is_waited_for_until_its_driver_has_gone_or_is_silent(tmp_path, monkeypatch):
    run, signs = LocalStorage(tmp_path), [{"id": "x", "time": 1}, {"id": "x", "time": 2}, None]
    monkeypatch.setattr(lease, "holder", lambda run: signs.pop(0))
    lease.wait_until_free(run, silent_s=1e9, look_s=0.0)
    assert signs == []
    monkeypatch.setattr(lease, "holder", lambda run: {"id": "x", "time": 1})
    lease.wait_until_free(run, silent_s=0.0, look_s=0.0)
