"""Signals to the driver: the workers are asked to save and leave, once, however many signals come."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from areal_ray.driver.signals import stopping_on_signals
from areal_ray.processes.own_session import children_in_own_session

pytestmark = pytest.mark.unit

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def heard():
    """Signals as they are in a terminal: in the background of a shell, and under nohup, some are ignored."""
    handlers = (signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL)
    before = [signal.signal(number, handler) for number, handler in zip(ALL, handlers, strict=True)]
    yield
    for number, handler in zip(ALL, before, strict=True):
        signal.signal(number, handler)


class Job:
    """A job that is told to stop, the first `away` times in vain."""

    def __init__(self, away: int = 0) -> None:
        self.calls, self._away, self.told = 0, away, threading.Event()

    def stop(self) -> None:
        self.calls += 1
        if self.calls <= self._away:
            raise ConnectionError("the head node is away")
        self.told.set()


@pytest.mark.parametrize("number", ALL)
def test_any_signal_asks_the_workers_to_leave_and_a_second_one_changes_nothing(number, capsys):
    job = Job()
    with stopping_on_signals(job.stop) as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), number)
        assert asked.wait(30)
        assert job.told.wait(30)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
    assert job.calls == 1
    assert "saving, then stopping" in capsys.readouterr().out


def test_only_the_third_interrupt_stops_at_once():
    job = Job()
    with pytest.raises(KeyboardInterrupt), stopping_on_signals(job.stop):  # noqa: PT012  (each of them is a step)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert job.told.wait(30)
        os.kill(os.getpid(), signal.SIGINT)
    assert job.calls == 1


def test_a_head_node_that_is_away_is_told_when_it_is_back():
    job = Job(away=2)
    with stopping_on_signals(job.stop, retry_s=0.0):
        os.kill(os.getpid(), signal.SIGTERM)
        assert job.told.wait(30)
    assert job.calls == 3


def test_a_signal_that_is_ignored_stays_so_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in ALL]
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_on_signals(pytest.fail) as asked:
            assert signal.getsignal(signal.SIGTERM) is not before[1]
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked.is_set()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert [signal.getsignal(number) for number in ALL] == before


def test_a_thread_that_cannot_handle_signals_leaves_them_alone():
    before, seen = [signal.getsignal(number) for number in ALL], []

    def elsewhere() -> None:
        with stopping_on_signals(pytest.fail):
            seen.extend(signal.getsignal(number) for number in ALL)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == before


def test_children_are_out_of_reach_of_the_group_and_only_while_the_block_lasts():
    class Own(subprocess.Popen):
        """As Ray has one."""

    def session_of(kind) -> int:
        command = [sys.executable, "-I", "-S", "-c", "import os; print(os.getsid(0) == os.getpid())"]
        with kind(command, stdout=subprocess.PIPE, text=True) as child:
            return child.communicate()[0].strip() == "True"

    with children_in_own_session():
        assert session_of(subprocess.Popen)
        assert session_of(Own)
    assert not session_of(Own)
