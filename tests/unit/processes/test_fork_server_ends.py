"""How forks, their launchers and the fork server come to an end, each with the others or without."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time

import psutil
import pytest

from areal_ray.processes import launch

from .forks import LIMIT_S, PREPARATION, ROOT, SAY, WAIT, first_number, said

pytestmark = pytest.mark.unit


def test_a_fork_that_ends_ends_the_one_that_stands_for_it(serve, run):
    name, _ = serve()
    process = run(name, WAIT)
    os.kill(first_number(process), signal.SIGKILL)
    assert process.wait(LIMIT_S) == 256 - signal.SIGKILL


def test_one_that_is_ended_takes_its_fork_with_it(serve, run):
    name, _ = serve()
    process = run(name, WAIT)
    fork = psutil.Process(first_number(process))
    process.kill()
    psutil.wait_procs([fork], timeout=LIMIT_S)
    assert not fork.is_running()
    assert said(run(name, SAY, "0"))["fork"]  # and the fork server serves on


def test_forks_outlive_the_fork_server(serve, run):
    name, server = serve()
    process = run(name, WAIT)
    fork = psutil.Process(first_number(process))
    server.kill()
    server.wait()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    fork.kill()
    assert process.wait(LIMIT_S) == 1


def test_it_ends_with_its_owner(serve, run, started):
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started(owner)
    name, server = serve(owner=owner.pid)
    assert said(run(name, SAY, "0"))["fork"]
    owner.kill()
    owner.wait()
    assert server.wait(LIMIT_S) == 0


def test_it_ends_when_it_is_needed_no_longer(serve, run):
    name, server = serve(idle=0.5)
    process = run(name, WAIT)
    fork = first_number(process)
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(1.5)
    os.kill(fork, signal.SIGKILL)
    assert server.wait(LIMIT_S) == 0


def test_where_there_is_none_one_is_started(run):
    name = secrets.token_hex(8)
    one, other = run(name, WAIT), run(name, WAIT)
    forks = [psutil.Process(first_number(process)) for process in (one, other)]
    (server,) = {fork.parent() for fork in forks}
    assert server.pid != os.getpid()
    try:
        assert server.cmdline()[-3:-1] == [name, str(os.getpid())]  # which started the launcher, as the raylet does
        assert server.parent().pid not in {process.pid for process in (one, other)}
        assert server.uids().real == os.getuid()
    finally:
        for left in (server, *forks):
            left.kill()


def test_signals_reach_the_fork(serve, run):
    name, _ = serve()
    process = run(
        name,
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(600)\n",
    )
    first_number(process)
    process.terminate()
    assert process.wait(LIMIT_S) == 5


def test_a_signal_that_comes_when_the_fork_has_just_begun_reaches_it(serve, tmp_path):
    name, _ = serve()
    script = tmp_path / "wait.py"
    script.write_text("import time; time.sleep(600)")
    own = f"""
import os, signal, sys
from areal_ray.processes import launch
write = os.write
def go(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
os.write = go
sys.exit(launch.main({name!r}, {PREPARATION!r}, {str(script)!r}))
"""
    done = subprocess.run([sys.executable, "-c", own], cwd=ROOT, timeout=LIMIT_S, check=False)
    assert done.returncode == 256 - signal.SIGTERM, "the fork's own end"


def test_a_fork_begins_with_a_word_and_not_before(serve, tmp_path, started):
    name, _ = serve()
    script, log = tmp_path / "once.py", tmp_path / "log"
    script.write_text(f"open({str(log)!r}, 'a').write('x')")
    for word, text in ((b"", ""), (launch.GO, "x")):
        log.write_text("")
        wait, go = os.pipe()
        with launch._connect(name, PREPARATION, time.monotonic() + LIMIT_S) as connection:
            request = json.dumps(launch._own([str(script)])).encode()
            launch.send_request(connection, request, wait)
            fork = psutil.Process(launch.receive_number(connection))
            os.close(wait)
            os.write(go, word)
            os.close(go)
            psutil.wait_procs([fork], timeout=LIMIT_S)
            assert log.read_text() == text


def test_a_fork_does_nothing_if_who_asked_has_waited_no_longer(serve, run, tmp_path, started):
    name, server = serve()
    assert said(run(name, SAY, "0"))["fork"]
    server.send_signal(signal.SIGSTOP)
    script, log = tmp_path / "once.py", tmp_path / "log"
    script.write_text(f"open({str(log)!r}, 'a').write('x')")
    arguments = name, PREPARATION, str(script)
    own = f"from areal_ray.processes import launch; launch.main(*{arguments!r}, wait_s=0.2)"
    subprocess.run([sys.executable, "-c", own], cwd=ROOT, check=True, timeout=LIMIT_S)
    server.send_signal(signal.SIGCONT)
    assert said(run(name, SAY, "0"))["fork"]  # so the request before has been seen
    assert log.read_text() == "x"


def test_a_stopped_fork_ends_with_what_ray_has_started(serve, run, tmp_path, started):
    name, _ = serve()
    script = tmp_path / "stop.py"
    script.write_text("import os, signal\nprint(os.getpid(), flush=True)\nos.kill(os.getpid(), signal.SIGSTOP)\n")
    command = [sys.executable, "-I", "-S", launch.__file__, name, PREPARATION, str(script)]
    raylet = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess\nsubprocess.run({command!r})"], stdout=subprocess.PIPE
    )
    started(raylet)
    fork = psutil.Process(first_number(raylet))
    raylet.kill()
    _, alive = psutil.wait_procs([fork], timeout=LIMIT_S)
    assert alive == []
