"""Reading ahead: in order, and within its bounds."""

import threading
import time
from functools import partial

import pytest

from areal_ray.storage import read_ahead

pytestmark = pytest.mark.unit


class Reads:
    """Reads that take a moment, and note how many and how much are under way or wait to be taken."""

    def __init__(self):
        self.lock, self.now, self.most, self.held, self.most_held = threading.Lock(), 0, 0, 0, 0

    def read(self, number, size):
        with self.lock:
            self.now += 1
            self.held += size
            self.most, self.most_held = max(self.most, self.now), max(self.most_held, self.held)
        time.sleep(0.001 * (7 * number % 5))
        with self.lock:
            self.now -= 1
        return number

    def all(self, sizes, **options):
        found = []
        for number in read_ahead(((size, partial(self.read, n, size)) for n, size in enumerate(sizes)), **options):
            found.append(number)
            with self.lock:
                self.held -= sizes[number]
        return found


def test_results_come_in_order_whatever_comes_first():
    reads = Reads()
    assert reads.all([1] * 100) == list(range(100))
    assert 1 < reads.most <= 8


def test_no_more_are_under_way_than_allowed():
    reads = Reads()
    assert reads.all([1] * 50, in_flight=3) == list(range(50))
    assert reads.most <= 3


@pytest.mark.parametrize("sizes", [[10] * 30, [1, 200, 5, 5, 300, 1, 1], [0] * 40])
def test_no_more_bytes_are_held_than_allowed_but_for_one_that_is_larger(sizes):
    reads = Reads()
    assert reads.all(sizes, limit=50) == list(range(len(sizes)))
    assert reads.most_held <= max(50, *sizes) + 50  # what is taken is let go of with the next


def test_nothing_to_read_is_no_error():
    assert list(read_ahead([])) == []


def test_the_first_failure_is_raised_in_its_place_and_ends_it():
    def read(number):
        if number in (3, 5):
            raise OSError(5, f"read {number}")
        done.append(number)
        return number

    done, found = [], []
    with pytest.raises(OSError, match="read 3"):
        found.extend(read_ahead(((1, partial(read, n)) for n in range(1000)), in_flight=4))
    assert found == [0, 1, 2]
    assert len(done) < 10


def test_whoever_stops_early_leaves_no_thread():
    for number in read_ahead((1, partial(int, n)) for n in range(1000)):
        if number == 5:
            break
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("read-ahead") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
