"""Cadence: what is due when, and that a resumed run fires where the undisturbed one does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_ray.train.cadence import Cadence

pytestmark = pytest.mark.unit

periods = st.none() | st.integers(1, 7)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def firings(cadence, moments):
    """The steps at which a cadence that is always obeyed fires."""
    fired = []
    for step, epoch in moments:
        if cadence.due(step, epoch):
            cadence.fired(step, epoch)
            fired.append(step)
    return fired


def every_step(last, steps_per_epoch=10):
    return [(step, step // steps_per_epoch) for step in range(1, last + 1)]


def test_steps_fire_at_their_multiples():
    assert firings(Cadence(steps=5), every_step(17)) == [5, 10, 15]


def test_epochs_fire_at_the_first_step_after_each_period():
    assert firings(Cadence(epochs=2), every_step(45)) == [20, 40]


def test_whichever_comes_first_fires():
    assert firings(Cadence(steps=8, epochs=1), every_step(25)) == [8, 10, 16, 20, 24]


def test_a_period_that_is_stepped_over_fires_late_and_once():
    assert firings(Cadence(steps=5), [(4, 0), (11, 0), (12, 0), (15, 0)]) == [11, 15]


def test_without_any_period_nothing_is_due():
    assert firings(Cadence(), every_step(30)) == []


def test_seconds_fire_by_the_clock_and_start_again_after_acting():
    clock = Clock()
    cadence = Cadence(seconds=10, clock=clock)
    clock.now = 109.9
    assert not cadence.due(1, 0)
    clock.now = 110.0
    assert cadence.due(2, 0)
    assert cadence.due(2, 0)  # asking changes nothing
    clock.now = 113.0
    cadence.fired(2, 0)
    clock.now = 122.9
    assert not cadence.due(3, 0)
    clock.now = 123.0
    assert cadence.due(4, 0)


def test_acting_for_another_reason_starts_the_seconds_again():
    clock = Clock()
    cadence = Cadence(steps=5, seconds=10, clock=clock)
    clock.now = 109.0
    assert cadence.due(5, 0)
    cadence.fired(5, 0)
    clock.now = 112.0
    assert not cadence.due(6, 0)


def test_ranks_agree_about_seconds_only():
    opinions = []

    def agree(opinion):
        opinions.append(opinion)
        return not opinion

    clock = Clock()
    assert firings(Cadence(steps=2, epochs=1, agree=agree), every_step(20)) == list(range(2, 21, 2))
    assert opinions == []
    assert Cadence(seconds=10, agree=agree, clock=clock).due(1, 0)  # the others say so
    assert opinions == [False]
    late = Cadence(seconds=10, agree=agree, clock=clock)
    clock.now += 10
    assert not late.due(1, 0)
    assert opinions == [False, True]


def test_ranks_agree_equally_often_whatever_else_is_due():
    asked = []
    cadence = Cadence(steps=2, seconds=10, agree=lambda opinion: bool(asked.append(opinion)), clock=Clock())
    for step in range(1, 5):
        cadence.due(step, 0)
    assert len(asked) == 4


def test_state_keeps_the_seconds_that_have_passed():
    clock = Clock()
    cadence = Cadence(seconds=10, clock=clock)
    clock.now = 106.0
    state = cadence.state_dict()
    assert state["elapsed_s"] == 6.0
    resumed = Cadence(seconds=10, clock=clock)
    clock.now = 5000.0  # another machine's clock
    resumed.load_state_dict(state)
    clock.now = 5003.9
    assert not resumed.due(1, 0)
    clock.now = 5004.0
    assert resumed.due(1, 0)


def test_state_without_seconds_has_no_time_in_it():
    assert "elapsed_s" not in Cadence(steps=5, epochs=1).state_dict()


@given(periods, periods, st.integers(0, 40), st.integers(1, 9))
def test_state_makes_the_round_trip(steps, epochs, last, steps_per_epoch):
    cadence, other = Cadence(steps, epochs), Cadence(steps, epochs)
    firings(cadence, every_step(last, steps_per_epoch))
    other.load_state_dict(cadence.state_dict())
    assert other.state_dict() == cadence.state_dict()


@given(periods, periods, st.integers(1, 40), st.integers(1, 9))
def test_an_extra_firing_in_between_leaves_no_trace_in_the_state(steps, epochs, last, steps_per_epoch):
    cadence, undisturbed = Cadence(steps, epochs), Cadence(steps, epochs)
    moments = every_step(last, steps_per_epoch)
    firings(cadence, moments)
    firings(undisturbed, moments)
    cadence.fired(*moments[-1])
    assert cadence.state_dict() == undisturbed.state_dict()


@given(periods, periods, st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.booleans())
def test_a_resumed_cadence_fires_where_an_undisturbed_one_does(steps, epochs, stop, more, steps_per_epoch, extra):
    moments = every_step(stop + more, steps_per_epoch)
    first, second = Cadence(steps, epochs), Cadence(steps, epochs)
    fired = firings(first, moments[:stop])
    if extra:  # the checkpoint at the end of a run that stops early
        first.fired(*moments[stop - 1])
    second.load_state_dict(first.state_dict())
    fired += firings(second, moments[stop:])
    assert fired == firings(Cadence(steps, epochs), moments)
