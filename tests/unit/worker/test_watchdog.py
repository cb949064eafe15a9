"""A process that makes no progress is ended, after what is long for the run itself, and says where it hung."""

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from areal_ray.config import WatchdogConfig
from areal_ray.worker import watchdog as module
from areal_ray.worker.watchdog import EXIT_STATUS, Watchdog

pytestmark = pytest.mark.unit

LIMITS = WatchdogConfig(factor=10.0, floor_s=8.0, patience_s=100.0)
SOON = WatchdogConfig(factor=1.0, floor_s=0.1, patience_s=0.1)
LONG = 60  # seconds after which a test has failed
COLLECTIVE = "/x/site-packages/torch/distributed/distributed_c10d.py"
KERNEL = "/x/site-packages/torch/nn/functional.py"
OWN = "/home/me/model.py"


class Clock:
    """Instead of `time`, and instead of the Event between two looks of the watchdog: no time passes by itself.

    `happens`, by the second, is what the watched thread does meanwhile.
    """

    def __init__(self):
        self.now, self.until, self.happens = 1000.0, 0.0, {}

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds
        for at in [at for at in self.happens if at <= self.now]:
            self.happens.pop(at)()
        return self.now > self.until


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def make():
    """A Watchdog that tells of its end instead of coming to it."""
    made = []

    def make(limits):
        stuck, ended = [], threading.Event()

        def end(status):
            stuck.append(status)
            ended.set()

        dog = Watchdog(limits, stuck.append, end)
        dog.seen, dog.ended = stuck, ended
        made.append(dog)
        return dog

    yield make
    for dog in made:
        dog.stop()


def watch(dog, clock, seconds, happens=None):
    """Look as its thread does, for so long; after how many seconds it has ended the process, or None."""
    began = clock.now
    clock.until = began + seconds
    clock.happens = {began + at: what for at, what in (happens or {}).items()}
    dog._stopped, stopped = clock, dog._stopped
    dog._watch()
    dog._stopped = stopped
    return clock.now - began if dog.ended.is_set() else None


def go_through(dog, clock, *phases):
    for phase, seconds in phases:
        dog.beat(phase)
        clock.now += seconds
    dog.beat(phases[-1][0])


def test_until_it_is_known_what_is_usual_there_is_patience(make, clock):
    dog = make(LIMITS)
    assert dog.limit() == 100.0
    dog.beat("step")
    assert dog.limit() == 100.0


@pytest.mark.parametrize(("seconds", "limit", "usual"), [(1.0, 48.0, 10.0), (6.0, 60.0, 12.0), (30.0, 100.0, 60.0)])
def test_the_first_steps_have_a_floor_of_their_own(make, clock, seconds, limit, usual):
    # The second one, after a first that compiled, perhaps; the third; and the fourth, when it is known what is usual.
    for durations, expected in (([seconds], limit), ([seconds, 1.0], limit), ([seconds, 1.0, 1.0], usual)):
        dog = make(LIMITS)
        go_through(dog, clock, *(("step", each) for each in durations))
        assert dog.limit() == pytest.approx(expected)


def test_it_says_which_step_it_was(make, clock):
    dog = make(LIMITS)
    dog.beat("step", 7)
    watch(dog, clock, 1000)
    assert dog.seen[0].step == 7


@pytest.mark.parametrize(
    ("durations", "limit"),
    [
        ([0.1, 0.1, 0.1], 8.0),  # the floor
        ([1.0, 2.0, 4.0], 20.0),  # the factor, of the median
        ([1.0, 1.0, 1.0, 30.0], 60.0),  # what has happened may happen again
        ([50.0, *[1.0] * 20], 10.0),  # but not for ever
        ([50.0, *[1.0] * 19], 100.0),
    ],
)
def test_the_limit_follows_from_what_steps_have_taken(make, clock, durations, limit):
    dog = make(LIMITS)
    go_through(dog, clock, *(("step", seconds) for seconds in durations))
    assert dog.limit() == pytest.approx(limit)


@pytest.mark.parametrize(("phase", "limit"), [("start", 100.0), ("save", 400.0), ("finish", 400.0)])
def test_of_what_waits_for_storage_nothing_is_learned(make, clock, phase, limit):
    dog = make(LIMITS)
    go_through(dog, clock, *[(phase, 0.1)] * 10)
    assert dog.limit() == limit


def test_phases_are_learned_apart(make, clock):
    dog = make(LIMITS)
    go_through(dog, clock, *[("step", 2.0), ("evaluate", 5.0), ("save", 90.0)] * 4)
    dog.beat("step")
    assert dog.limit() == pytest.approx(20.0)
    dog.beat("evaluate")
    assert dog.limit() == pytest.approx(50.0)
    dog.beat("save")
    assert dog.limit() == 400.0


def test_it_ends_the_process_that_long_after_the_last_beat(make, clock):
    dog = make(LIMITS)
    after = watch(dog, clock, 1000, {at: lambda: dog.beat("start") for at in (80, 160, 170, 250)})
    assert after == pytest.approx(250 + 100, abs=2 * module._TICK_S)
    what, status = dog.seen
    assert status == EXIT_STATUS
    assert what.phase == "start"
    assert what.seconds == pytest.approx(100.0, abs=2 * module._TICK_S)


def test_while_there_are_beats_nothing_happens(make, clock):
    dog = make(LIMITS)
    go_through(dog, clock, *[("step", 1.0)] * 3)
    assert watch(dog, clock, 1000, {at: lambda: dog.beat("step") for at in range(0, 1001, 5)}) is None
    assert dog.seen == []


def test_a_beat_in_the_last_moment_counts(make, clock, monkeypatch):
    dog = make(WatchdogConfig(patience_s=5.0))
    stacks = module._place

    def place(frame):
        if clock.now < 1010:
            dog.beat("save")  # while the watchdog looks where the thread is
        return stacks(frame)

    monkeypatch.setattr(module, "_place", place)
    assert watch(dog, clock, 1000) > 9


def test_time_in_which_the_whole_process_stood_still_does_not_count(make, clock):
    dog = make(LIMITS)

    def stand_still():
        clock.now += 5000

    after = watch(dog, clock, 6000, {50: stand_still})
    assert after == pytest.approx(5000 + 100, abs=2 * module._TICK_S)


@pytest.fixture
def hang():
    """Start a thread that hangs in a function from such a file: a Watchdog that watches it."""
    threads, over = [], threading.Lock()
    over.acquire()
    source = "def wait(lock, ready):\n    ready.set()\n    lock.acquire()\n"

    def hang(make, limits, filename):
        ready, names, made = threading.Event(), {}, []
        exec(compile(source, filename, "exec"), names)

        def rank():
            made.append(make(limits))
            names["wait"](over, ready)
            over.release()

        threads.append(threading.Thread(target=rank))
        threads[-1].start()
        assert ready.wait(LONG)
        return made[0]

    yield hang
    over.release()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(("filename", "waiting"), [(OWN, False), (COLLECTIVE, True), (KERNEL, True)])
def test_a_rank_that_waits_for_others_lets_them_go_first(hang, make, clock, filename, waiting):
    dog = hang(make, LIMITS, filename)
    after = watch(dog, clock, 1000)
    assert after == pytest.approx(100 + waiting * module._GRACE_S, abs=2 * module._TICK_S)
    assert dog.seen[0].waiting is waiting


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
    dog = hang(make, SOON, COLLECTIVE)
    dog.start()
    assert dog.ended.wait(LONG)
    assert dog.seen[0].where.startswith(__file__)
    assert dog.seen[0].where.endswith(" in rank")


def test_it_is_told_before_the_process_ends(make):
    order = []
    ended = threading.Event()
    dog = Watchdog(SOON, lambda what: order.append("told"), lambda status: (order.append("ended"), ended.set()))
    dog.start()
    assert ended.wait(LONG)
    dog.stop()
    assert order == ["told", "ended"]


def test_once_stopped_it_ends_nothing(make, monkeypatch):
    monkeypatch.setattr(module, "_TICK_S", 0.01)
    dog = make(WatchdogConfig(patience_s=3600.0))
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
        "watchdog._LAST_RESORT_S = 0.1",
        "dog = watchdog.Watchdog(WatchdogConfig(patience_s=1.0), print)",
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
        "dog = watchdog.Watchdog(WatchdogConfig(patience_s=0.1), lambda what: print(what.where, flush=True))",
        "dog.start()",
        "threading.Event().wait()",
    ]
    with python(*lines) as process:
        assert process.communicate(timeout=LONG)[0] == "<string>:6 in <module>\n"
    assert process.returncode == EXIT_STATUS


def test_a_hang_of_the_interpreter_itself_ends_by_the_last_resort():
    lines = [
        "watchdog._LAST_RESORT_S = 0.2",
        "watchdog.Watchdog(WatchdogConfig(patience_s=0.1), print).start()",
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
        "dog = watchdog.Watchdog(WatchdogConfig(patience_s=2.0), print)",
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
