"""Limits of the watchdog, learned from the durations of each phase, under a clock that the test moves."""

import pytest

from areal_ray.config import WatchdogConfig
from areal_ray.worker import watchdog as module
from areal_ray.worker.watchdog import EXIT_STATUS
from tests.unit.worker.watchdog_clock import COLLECTIVE, KERNEL, LIMITS, OWN, TICK_S, go_through, watch

pytestmark = pytest.mark.unit


def test_until_it_is_known_what_is_usual_there_is_patience(make, clock):
    dog = make(LIMITS, clock=clock)
    assert dog.limit() == 100.0
    dog.beat("step")
    assert dog.limit() == 100.0


@pytest.mark.parametrize(("seconds", "limit", "usual"), [(1.0, 48.0, 10.0), (6.0, 60.0, 12.0), (30.0, 100.0, 60.0)])
def test_the_first_steps_have_a_floor_of_their_own(make, clock, seconds, limit, usual):
    # The second one, after a first that compiled, perhaps; the third; and the fourth, when it is known what is usual.
    for durations, expected in (([seconds], limit), ([seconds, 1.0], limit), ([seconds, 1.0, 1.0], usual)):
        dog = make(LIMITS, clock=clock)
        go_through(dog, clock, *(("step", each) for each in durations))
        assert dog.limit() == pytest.approx(expected)


def test_it_says_which_step_it_was(make, clock):
    dog = make(LIMITS, clock=clock)
    dog.beat("step", 7)
    dog.attempt = 3
    watch(dog, clock, 1000)
    assert (dog.seen[0].step, dog.seen[0].attempt) == (7, 3)


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
    dog = make(LIMITS, clock=clock)
    go_through(dog, clock, *(("step", seconds) for seconds in durations))
    assert dog.limit() == pytest.approx(limit)


@pytest.mark.parametrize(
    ("phase", "limit"),
    [("start", 100.0), ("connect all ranks", 30.0), ("build", 100.0), ("save", 400.0), ("finish", 400.0)],
)
def test_of_what_waits_for_storage_nothing_is_learned(make, clock, phase, limit):
    dog = make(LIMITS, clock=clock)
    go_through(dog, clock, *[(phase, 0.1)] * 10)
    assert dog.limit() == limit


def test_phases_are_learned_apart(make, clock):
    dog = make(LIMITS, clock=clock)
    go_through(dog, clock, *[("step", 2.0), ("evaluate", 5.0), ("save", 90.0)] * 4)
    dog.beat("step")
    assert dog.limit() == pytest.approx(20.0)
    dog.beat("evaluate")
    assert dog.limit() == pytest.approx(50.0)
    dog.beat("save")
    assert dog.limit() == 400.0


def test_it_ends_the_process_that_long_after_the_last_beat(make, clock):
    dog = make(LIMITS, clock=clock)
    after = watch(dog, clock, 1000, {at: lambda: dog.beat("start") for at in (80, 160, 170, 250)})
    assert after == pytest.approx(250 + 100, abs=2 * TICK_S)
    what, status = dog.seen
    assert status == EXIT_STATUS
    assert what.phase == "start"
    assert what.seconds == pytest.approx(100.0, abs=2 * TICK_S)


def test_while_there_are_beats_nothing_happens(make, clock):
    dog = make(LIMITS, clock=clock)
    go_through(dog, clock, *[("step", 1.0)] * 3)
    assert watch(dog, clock, 1000, {at: lambda: dog.beat("step") for at in range(0, 1001, 5)}) is None
    assert dog.seen == []


def test_a_beat_in_the_last_moment_counts(make, clock, monkeypatch):
    dog = make(WatchdogConfig(floor_s=10.0, patience_s=5.0), clock=clock)
    stacks = module._place

    def place(frame):
        if clock.now < 1010:
            dog.beat("save")  # while the watchdog looks where the thread is
        return stacks(frame)

    monkeypatch.setattr(module, "_place", place)
    assert watch(dog, clock, 1000) > 9


def test_time_in_which_the_whole_process_stood_still_does_not_count(make, clock):
    dog = make(LIMITS, clock=clock)

    def stand_still():
        clock.now += 5000

    after = watch(dog, clock, 6000, {50: stand_still})
    assert after == pytest.approx(5000 + 100, abs=2 * TICK_S)


@pytest.mark.parametrize(("filename", "waiting"), [(OWN, False), (COLLECTIVE, True), (KERNEL, True)])
def test_a_rank_that_waits_for_others_lets_them_go_first(hang, make, clock, filename, waiting):
    dog = hang(make, LIMITS, filename, clock=clock, grace_s=1.5)
    after = watch(dog, clock, 1000)
    assert after == pytest.approx(100 + waiting * 1.5, abs=2 * TICK_S)
    assert dog.seen[0].waiting is waiting
