"""Memory that outlives its process: files that a child keeps until a successor takes them over."""

from __future__ import annotations

import itertools
import os
import secrets
import select
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from areal_ray.processes import memory_keeper
from areal_ray.processes.launch import address

from .forks import as_a_stranger

pytestmark = pytest.mark.unit


@pytest.fixture
def name() -> Iterator[str]:
    """Of a run; what its rank has left behind is let go."""
    name = secrets.token_hex(8)
    yield name
    for file in memory_keeper.claim(f"{name}-0"):
        os.close(file)


KEEPS = """
import os, signal, sys
from areal_ray.processes.memory_keeper import MemoryKeeper
files = [os.memfd_create("kept") for _ in range(2)]
for number, file in enumerate(files):
    os.write(file, b"content %d" % number)
kept = MemoryKeeper(sys.argv[1], files, int(sys.argv[2]))
print("ready", flush=True)
if sys.stdin.readline() == "release\\n":
    kept.release()
    print("released", flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def keeps(name: str) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """Starts a process that has two files kept until its standard input says that it is to die."""
    started = []

    def start(owner: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", KEEPS, f"{name}-0", str(owner)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_files_outlive_their_process(name: str, keeps: Any) -> None:
    process = keeps(os.getpid())
    assert psutil.Process(process.pid).children() == []  # Ray ends the children of a worker
    process.stdin.close()
    process.wait()
    files = memory_keeper.claim(f"{name}-0")
    assert [os.pread(file, 20, 0) for file in files] == [b"content 0", b"content 1"]
    for file in files:
        os.close(file)
    assert memory_keeper.claim(f"{name}-0") == []


def test_files_stay_until_a_successor_says_that_it_has_them(name: str, keeps: Any) -> None:
    process = keeps(os.getpid())
    process.stdin.close()
    process.wait()
    ((_, there),) = memory_keeper._keepers(f"{name}-0")
    with socket.socket(socket.AF_UNIX) as connection:  # of one that is killed when they have come
        connection.connect(there)
        for file in socket.recv_fds(connection, 1, 8)[1]:
            os.close(file)
    files = memory_keeper.claim(f"{name}-0")
    assert len(files) == 2
    for file in files:
        os.close(file)


def test_a_keeper_is_there_until_it_has_been_looked_at(name: str, keeps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    look = memory_keeper.check_peer

    def late(connection: socket.socket) -> None:
        """As on a busy machine: the keeper has sent everything, and has nothing left to do."""
        select.select([connection], [], [])
        keeper = psutil.Process(
            struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        )
        while keeper.status() not in (psutil.STATUS_SLEEPING, psutil.STATUS_ZOMBIE):
            os.sched_yield()
        look(connection)

    process = keeps(os.getpid())
    process.stdin.close()
    process.wait()
    monkeypatch.setattr(memory_keeper, "check_peer", late)
    files = memory_keeper.claim(f"{name}-0")
    assert len(files) == 2
    for file in files:
        os.close(file)


def test_a_process_that_lives_keeps_its_files(name: str, keeps: Any) -> None:
    keeps(os.getpid())
    assert memory_keeper.claim(f"{name}-0", wait_s=0.1) == []


def test_names_are_found_by_how_they_begin(name: str, keeps: Any) -> None:
    process = keeps(os.getpid())
    assert memory_keeper.kept_names(f"{name}-") == [f"{name}-0"]
    assert memory_keeper.kept_names(f"{name}-1") == []
    process.stdin.close()
    process.wait()
    assert memory_keeper.kept_names(name) == [f"{name}-0"]
    keeper = keeper_of(process)
    for file in memory_keeper.claim(f"{name}-0"):
        os.close(file)
    keeper.wait(60)  # its connection has the name, too
    assert memory_keeper.kept_names(name) == []


def keeper_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The process that keeps the files of another one."""
    there = psutil.process_iter(["cmdline"])
    mine = ["areal_ray.processes.memory_keeper", str(process.pid)]
    return next(each for each in there if (each.info["cmdline"] or [])[2:4] == mine)


def is_over(name: str) -> None:
    """Wait until the process that keeps the files has ended."""
    with socket.socket(socket.AF_UNIX) as connection:
        if not (there := memory_keeper._keepers(f"{name}-0")):
            return
        try:
            connection.connect(there[0][1])
        except ConnectionRefusedError:
            return
        connection.settimeout(60)
        try:
            assert connection.recv(1) == b""
        except ConnectionResetError:
            return


def test_what_is_released_is_gone(name: str, keeps: Any) -> None:
    process = keeps(os.getpid())
    process.stdin.write("release\n")
    process.stdin.flush()
    assert process.stdout.readline() == "released\n"
    is_over(name)
    process.stdin.close()
    process.wait()
    assert memory_keeper.claim(f"{name}-0") == []


@pytest.mark.parametrize("when", ["while its process lives", "afterwards"])
def test_it_ends_with_its_owner(name: str, keeps: Any, when: str) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as owner:
        process = keeps(owner.pid)
        if when == "afterwards":
            process.stdin.close()
            process.wait()
        owner.kill()
    is_over(name)


def test_it_does_not_start_without_its_owner(name: str) -> None:
    with subprocess.Popen(["true"]) as owner:
        owner.wait()
    with open(os.devnull) as file, pytest.raises(OSError, match="did not start"):
        memory_keeper.MemoryKeeper(f"{name}-0", [file.fileno()], owner.pid)


def test_a_process_that_its_process_has_forked_hides_no_death(name: str, keeps: Any) -> None:
    process = keeps(os.getpid())
    with open(f"/proc/{process.pid}/fd/{pipe_of(process.pid)}", "wb"):  # as a fork would have it
        process.kill()
        process.wait()
        files = memory_keeper.claim(f"{name}-0")
    assert len(files) == 2
    for file in files:
        os.close(file)


def pipe_of(pid: int) -> int:
    """The writing end that a process has of a pipe, beside its standard streams."""
    (found,) = (
        int(entry.name)
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if int(entry.name) > 2 and os.readlink(entry).startswith("pipe:")
    )
    return found


@pytest.fixture
def squat(name: str) -> Iterator[Callable[[], None]]:
    """Takes a name that looks like a keeper's, as any user can."""
    with ExitStack() as sockets:

        def take() -> socket.socket:
            squatter = sockets.enter_context(socket.socket(socket.AF_UNIX))
            squatter.bind(address(f"{name}-0~{secrets.token_hex(8)}"))
            return squatter

        def squat() -> None:
            as_a_stranger(take().listen)
            full = take()
            full.listen(0)
            sockets.enter_context(socket.socket(socket.AF_UNIX)).connect(full.getsockname())
            take()  # and one that is refused

        yield squat


def test_names_that_others_have_taken_hold_nothing(name: str, squat: Callable[[], None]) -> None:
    squat()
    assert memory_keeper.claim(f"{name}-0", wait_s=0.1) == []


def test_nobody_is_waited_for_where_all_are_gone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = selectors.DefaultSelector.select

    def for_somebody(self: selectors.DefaultSelector, timeout: float | None = None) -> Any:
        assert self.get_map()
        return wait(self, timeout)

    monkeypatch.setattr(selectors.DefaultSelector, "select", for_somebody)
    with socket.socket(socket.AF_UNIX) as refuses:  # as one does that ends after it was listed
        refuses.bind(address(f"{name}-0~{secrets.token_hex(8)}"))
        assert memory_keeper.kept_names(name) == [f"{name}-0"]
        assert memory_keeper.claim(f"{name}-0") == []


def test_whoever_takes_names_and_fills_queues_does_not_hide_what_is_kept(
    name: str, keeps: Any, squat: Callable[[], None]
) -> None:
    squat()
    others = set(memory_keeper._keepers(f"{name}-0"))
    process = keeps(os.getpid())
    ((_, mine),) = set(memory_keeper._keepers(f"{name}-0")) - others
    waiting = [socket.socket(socket.AF_UNIX) for _ in range(memory_keeper._QUEUE + 1)]
    as_a_stranger(lambda: [each.connect(mine) for each in waiting])
    assert memory_keeper.claim(f"{name}-0", wait_s=0.1) == []
    process.stdin.close()
    process.wait()
    files = memory_keeper.claim(f"{name}-0", wait_s=60)
    assert len(files) == 2
    for each in waiting:
        each.close()
    for file in files:
        os.close(file)


def test_others_who_knock_do_not_make_it_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen(["true"])
    parent = os.pidfd_open(ended.pid)
    ended.wait()
    knocking = [socket.socket(socket.AF_UNIX) for _ in range(5)]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address(name))
        listener.listen(5)
        as_a_stranger(lambda: [each.connect(address(name)) for each in knocking])
        clock = itertools.count(0.0, memory_keeper.WAIT_S / 2.5)
        monkeypatch.setattr(memory_keeper.time, "monotonic", lambda: next(clock))
        memory_keeper._keep(parent, None, listener, [parent])
        listener.setblocking(False)
        for _ in range(3):  # two of them were seen to
            listener.accept()[0].close()
        with pytest.raises(BlockingIOError):
            listener.accept()
    for each in knocking:
        each.close()
    os.close(parent)


def test_nothing_is_left_in_a_directory(name: str, keeps: Any) -> None:
    before = set(os.listdir("/dev/shm"))
    keeps(os.getpid())
    deadline = time.monotonic() + 30  # what others open and unlink there meanwhile is gone by then
    while (left := set(os.listdir("/dev/shm")) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == set()
    assert not Path(address(f"{name}-0")[1:]).exists()


def test_a_record_is_found_from_the_end_of_its_file() -> None:
    file, copy = os.memfd_create("kept"), os.memfd_create("copy")
    assert memory_keeper.find_record(file) is None
    memory_keeper.write_record(file, 100, {"step": 4})
    size = os.fstat(file).st_size
    assert memory_keeper.find_record(file) == (100, {"step": 4})
    os.pwrite(copy, os.pread(file, size, 100), 100)
    assert memory_keeper.find_record(copy) == (100, {"step": 4})
    for cut in (size - 1, 101, 100, 7):
        os.ftruncate(file, cut)
        assert memory_keeper.find_record(file) is None
    os.pwrite(copy, bytes([255]), 120)
    assert memory_keeper.find_record(copy) is None


def test_a_record_is_read_whole_or_not_at_all() -> None:
    file = os.memfd_create("kept")
    memory_keeper.write_record(file, 100, {"step": 4})
    size = os.fstat(file).st_size
    assert memory_keeper.read_record(file, 100) == {"step": 4}
    assert memory_keeper.read_record(file, 99) is None
    os.ftruncate(file, size - 1)
    assert memory_keeper.read_record(file, 100) is None
    os.close(file)


def test_free_memory_is_part_of_all() -> None:
    free, total = memory_keeper.free_memory()
    assert 0 < free < total <= psutil.virtual_memory().total


@pytest.mark.parametrize("path", [b"\0rv-\xff\xfe", b"\0rv-\n", b"\0rv- \n\n x"])
def test_names_of_others_may_be_any_bytes(name: str, path: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(path)
        assert memory_keeper.kept_names(name) == []
