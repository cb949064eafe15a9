"""A process that hangs is ended by its watchdog, which says where: real threads and processes."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from areal_ray.config import WatchdogConfig
from areal_ray.worker.watchdog import EXIT_STATUS, Watchdog
from tests.unit.worker.watchdog_clock import COLLECTIVE, LONG, OWN, SOON

pytestmark = pytest.mark.unit


def test_it_says_where_in_the_user_s_code_the_thread_is(hang, make):
    dog = hang(make, SOON, OWN)
    dog.start()
    assert dog.ended.wait(LONG)
    what, status = dog.seen
    assert (what.phase, what.where, what.waiting) == ("start", f"{OWN}:3 in wait", False)
    assert what.seconds >= 0.1
    assert f'File "{OWN}", line 3 in wait' in what.stacks
    assert "test_it_says_where_in_the_user_s_code_the_thread_is" in what.stacks  # of all threads
    assert status == EXIT_STATUS


def test_the_user_s_line_is_told_also_if_it_waits_in_a_library(hang, make):
    dog = hang(make, SOON, COLLECTIVE, grace_s=0.1)
    dog.start()
    assert dog.ended.wait(LONG)
    assert dog.seen[0].where.startswith(hang.__code__.co_filename)
    assert dog.seen[0].where.endswith(" in rank")


def test_it_is_told_before_the_process_ends(make):
    order = []
    ended = threading.Event()
    dog = Watchdog(SOON, lambda what: order.append("told"), lambda status: (order.append("ended"), ended.set()))
    dog.start()
    assert ended.wait(LONG)
    dog.stop()
    assert order == ["told", "ended"]


def test_once_stopped_it_ends_nothing(make):
    dog = make(WatchdogConfig(floor_s=10.0, patience_s=3600.0), tick_s=0.01)
    dog.start()
    assert dog._thread.is_alive()
    dog.stop()
    assert not dog._thread.is_alive()
    assert dog.seen == []


def python(*lines, **options):
    """Start a process that has a Watchdog."""
    head = [
        "import ctypes, os, signal, threading",
        "from areal_ray.worker import watchdog",
        "from areal_ray.config import WatchdogConfig",
    ]
    command = [sys.executable, "-c", "\n".join([*head, *lines])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_once_stopped_the_last_resort_is_called_off():
    lines = [
        "dog = watchdog.Watchdog(WatchdogConfig(floor_s=10.0, patience_s=1.0), print, last_resort_s=0.1)",
        "dog.start()",
        "dog.stop()",
        "ctypes.PyDLL(None).usleep(2_000_000)",  # twice as long as the last resort would have taken
        "print('alive')",
    ]
    with python(*lines) as process:
        assert process.communicate(timeout=LONG)[0] == "alive\n"
    assert process.returncode == 0


def test_a_hang_ends_the_process_with_the_status_that_says_so():
    lines = [
        "limits = WatchdogConfig(floor_s=10.0, patience_s=0.1)",
        "dog = watchdog.Watchdog(limits, lambda what: print(what.where, flush=True))",
        "dog.start()",
        "threading.Event().wait()",
    ]
    with python(*lines) as process:
        assert process.communicate(timeout=LONG)[0] == "<string>:7 in <module>\n"
    assert process.returncode == EXIT_STATUS


def test_a_hang_of_the_interpreter_itself_ends_by_the_last_resort():
    lines = [
        "watchdog.Watchdog(WatchdogConfig(floor_s=10.0, patience_s=0.1), print, last_resort_s=0.2).start()",
        "print('hanging', flush=True)",
        "ctypes.PyDLL(None).sleep(1_000_000)",  # unlike CDLL it keeps the interpreter to itself
    ]
    with python(*lines) as process:
        try:
            assert process.communicate(timeout=LONG)[0] == "hanging\n"
        finally:
            process.kill()
    assert process.returncode == 1


def test_a_process_that_was_stopped_and_goes_on_is_not_ended():
    lines = [
        "dog = watchdog.Watchdog(WatchdogConfig(floor_s=10.0, patience_s=2.0), print)",
        "dog.start()",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "for _ in range(3):",
        "    threading.Event().wait(0.5)",  # in which the watchdog looks, and sees how late it is
        "dog.stop()",
        "print('alive')",
    ]
    with python(*lines) as process:
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            with pytest.raises(subprocess.TimeoutExpired):  # longer than its patience
                process.wait(timeout=4)
            process.send_signal(signal.SIGCONT)
            out, _ = process.communicate(timeout=LONG)
        finally:
            process.kill()
    assert (out, process.returncode) == ("alive\n", 0)
