"""Forks of a fork server: everything that one has from its launcher, and the requests that are refused."""

import json
import os
import resource
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from areal_ray.processes import fork_checks, launch

from .forks import LIMIT_S, PREPARATION, SAY, as_a_stranger, said

pytestmark = pytest.mark.unit


def test_a_fork_has_everything_from_the_one_that_started_it(serve, run, tmp_path):
    name, _ = serve()
    # What is read at import, as OPENBLAS_CORETYPE where that is set, must be the fork server's.
    read = fork_checks.at_import(dict(os.environ))
    own = {**read, "PATH": os.environ["PATH"], "MINE": "1", "PYTHONPATH": "/mine:/yours"}
    folder = tmp_path / "folder"
    folder.mkdir()
    core = max(os.sched_getaffinity(0))

    def prepare():
        os.sched_setaffinity(0, [core])
        resource.setrlimit(resource.RLIMIT_NOFILE, (99, 100))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

    process = run(name, SAY, "7", "--flag", env=own, cwd=folder, umask=0o027, preexec_fn=prepare)
    fork = said(process, "a line")
    assert process.returncode == 7
    assert fork["fork"]
    assert {key: value for key, value in fork["environment"].items() if key in own} == own
    assert not {"HOME", "LC_ALL"} & set(fork["environment"])
    assert fork["arguments"] == [str(tmp_path / "script.py"), "7", "--flag"]
    assert (fork["folder"], fork["umask"], fork["main"], fork["input"]) == (str(folder), 0o027, "__main__", "a line")
    assert fork["path"][:3] == [str(tmp_path), "/mine", "/yours"]
    assert fork["group"]  # one that Ray can end as a whole
    assert not fork["leads"]
    assert (fork["cores"], fork["blocked"], fork["files"]) == ([core], [signal.SIGUSR1], [99, 100])
    assert fork["descriptors"] == ["0", "1", "2", "3"]  # the last is of listing them

    alone = subprocess.run(
        [sys.executable, tmp_path / "script.py", "0"], env=own, input="", capture_output=True, text=True
    )
    ordinary = json.loads(alone.stdout)
    assert not ordinary["fork"]
    assert fork["path"] == ordinary["path"]
    assert (fork["oom"], fork["main"]) == (ordinary["oom"], ordinary["main"])


def test_forks_draw_different_random_numbers(serve, run):
    name, _ = serve()
    one, other = (said(run(name, SAY, "0"))["random"] for _ in range(2))
    assert one[0] != other[0]
    assert one[1] != other[1]


def test_one_for_which_something_was_read_otherwise_is_no_fork(serve, run):
    name, server = serve()
    environment = {**os.environ, "RAY_JOB_ID": "01000000"}
    assert said(run(name, SAY, "0", env=environment))["fork"]
    for change, fork in (
        ({"RAY_TRAIN_X": "1"}, True),
        ({"OTHER": "1"}, True),
        ({"RAY_JOB_ID": "02000000"}, False),
        ({"OMP_NUM_THREADS": "7"}, True),
        ({"LD_PRELOAD": ""}, False),
        ({"LD_PRELOAD": "", "OTHER": "2"}, False),
    ):
        process = run(name, SAY, "3", env={**environment, **change})
        assert said(process)["fork"] is fork
        assert process.returncode == 3
    server.kill()
    reasons = [line for line in server.stderr.read().decode().splitlines() if "started anew" in line]
    assert [reason.partition("forked: ")[2] for reason in reasons] == [  # each once
        "Ray reads RAY_JOB_ID when it is imported, and it is another one there",
        "libraries read LD_PRELOAD when they are loaded, and it is another one there",
    ]


def test_each_of_several_nodes_on_a_machine_has_a_fork_server_of_its_own(serve, run):
    name, first = serve()
    _, second = serve(name=f"{name}-22")
    for node, server in (("11", first), ("22", second), ("11", first), ("22", second)):
        process = run(name, SAY, "4", env={**os.environ, launch.NODE: node})
        fork = said(process)
        assert (fork["fork"], fork["parent"]) == (True, server.pid)
        assert process.returncode == 4


def test_where_the_fork_server_is_of_no_use_the_process_is_an_ordinary_one(serve, run):
    name, server = serve(before=("no_such_module",))
    for _ in range(2):
        process = run(name, SAY, "5")
        assert not said(process)["fork"]
        assert process.returncode == 5
    server.kill()
    assert b"No module named 'no_such_module'" in server.stderr.read()


def test_one_that_may_more_than_the_fork_server_is_no_fork(serve, run):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    less = hard - 1 if hard > 0 else 4096
    name, _ = serve(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, less), less)))
    process = said(run(name, SAY, "0"))
    assert not process["fork"]
    assert process["files"] == [soft, hard]


def test_of_another_user_nothing_is_taken(monkeypatch):
    one, other = socket.socketpair()
    with one, other:
        launch.check_peer(one)
        monkeypatch.setattr(launch.os, "getuid", lambda: 1 + os.geteuid())
        with pytest.raises(PermissionError, match="another user"):
            launch.check_peer(one)


@pytest.mark.parametrize("kind", ["mnt", "pid"])
def test_of_another_container_nothing_is_taken(kind, monkeypatch):
    stat, own = os.stat, f"/proc/{os.getpid()}/ns/{kind}"
    monkeypatch.setattr(launch.os, "stat", lambda path: stat("/" if path == own else path))
    one, other = socket.socketpair()
    with one, other, pytest.raises(PermissionError, match="another container"):
        launch.check_peer(one)


def test_of_a_process_that_cannot_be_seen_nothing_is_taken():
    class Connection:
        def getsockopt(self, *_):
            return struct.pack("iII", 0, os.getuid(), os.getgid())

    with pytest.raises(PermissionError, match="another container"):
        launch.check_peer(Connection())


def test_where_a_stranger_has_its_name_the_process_is_an_ordinary_one(run):
    name = secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(launch.address(name))
        as_a_stranger(squatter.listen)
        process = run(name, SAY, "5")
        out, err = process.communicate("", timeout=LIMIT_S)
    assert process.returncode == 5
    assert not json.loads(out)["fork"]
    (line,) = [line for line in err.splitlines() if "no fork server" in line]
    assert "gone; this process does all its imports itself" in line


def test_where_a_stranger_fills_its_queue_the_process_is_an_ordinary_one(run, monkeypatch):
    name = secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX) as squatter, socket.socket(socket.AF_UNIX) as first:
        squatter.bind(launch.address(name))
        squatter.listen(0)
        first.connect(launch.address(name))
        monkeypatch.setattr(launch, "_FIND_S", 0.1)
        with pytest.raises(BlockingIOError):
            launch._connect(name, PREPARATION, time.monotonic() + LIMIT_S)  # of which main() knows what to do


def test_strangers_are_counted_and_the_others_served(serve, run):
    name, server = serve(before=("numpy.random",))
    strangers = [socket.socket(socket.AF_UNIX) for _ in range(200)]
    as_a_stranger(lambda: [each.connect(launch.address(name)) for each in strangers])
    for stranger in strangers:
        assert stranger.recv(1) == b""
        stranger.close()
    assert said(run(name, SAY, "0"))["fork"]
    server.kill()
    first, *more = server.stderr.read().decode().splitlines()  # the others after a minute
    # The last may also be one that was not looked at in time, on a busy machine.
    assert first.startswith("fork server: 1 connections refused, the last: ")
    assert not [line for line in more if "refused" in line]


def test_whoever_knocks_keeps_no_fork_server_alive(serve):
    name, server = serve(before=("numpy.random",), idle=0.5)
    knocks = 0
    while server.poll() is None:
        with socket.socket(socket.AF_UNIX) as stranger, suppress(ConnectionRefusedError):
            stranger.connect(launch.address(name))
            knocks += 1
    lines = [line for line in server.stderr.read().decode().splitlines() if "refused" in line]
    assert sum(int(line.split()[2]) for line in lines) > 1  # the rest at the end
    assert len(lines) == 2 <= knocks


def test_containers_that_share_a_network_have_fork_servers_of_their_own():
    spaces = [str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in ("mnt", "pid")]
    assert launch.address("name") == "\0areal_ray-name-" + "-".join(spaces)
