"""Watchdogs that tell of an end instead of coming to it, and threads that hang for them."""

import threading

import pytest

from areal_ray.worker.watchdog import Watchdog
from tests.unit.worker.watchdog_clock import LONG, Clock


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make():
    """Make a Watchdog; its report and its exit status are in `seen`, in this order."""
    made = []

    def make(limits, **intervals):
        seen, ended = [], threading.Event()

        def end(status):
            seen.append(status)
            ended.set()

        dog = Watchdog(limits, seen.append, end, **intervals)
        dog.seen, dog.ended = seen, ended
        made.append(dog)
        return dog

    yield make
    for dog in made:
        dog.stop()


@pytest.fixture
def hang():
    """Start a thread that hangs in a function from such a file: a Watchdog that watches it."""
    threads, over = [], threading.Lock()
    over.acquire()
    source = "def wait(lock, ready):\n    ready.set()\n    lock.acquire()\n"

    def hang(make, limits, filename, **intervals):
        ready, names, made = threading.Event(), {}, []
        exec(compile(source, filename, "exec"), names)

        def rank():
            made.append(make(limits, **intervals))
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
