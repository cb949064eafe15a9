"""The straggler detector names the rank that is slow, and no other."""

import pytest
import torch
from torch import nn

from areal_ray.worker.stragglers import StragglerDetector

pytestmark = pytest.mark.unit


class Unit(nn.Module):
    """Takes its time, by a clock that the test moves."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        self.clock[0] += self.seconds
        return x


class Others:
    """Rank 0 of some ranks, whose times the test says."""

    rank = 0

    def __init__(self, others):
        self.others, self.asked = others, 0

    def gather_to_rank_zero(self, own):
        self.asked += 1
        self.own = own
        return [own, *self.others]


def steps(others, count, own=0.2, making=lambda: 0.0, every=4):
    said, clock = [], [0.0]
    unit = Unit(clock, own)
    ranks = Others(others)

    def slow(*what):
        said.append(what)

    stragglers = StragglerDetector([unit], making, torch.device("cpu"), ranks, every, slow, lambda: clock[0])
    for _ in range(count):
        unit(torch.zeros(1))
        clock[0] += 0.3  # waiting, which is not its own
        stragglers.after_step()
    return said, ranks


def test_own_time_is_that_of_the_units_and_of_the_data_and_not_of_waiting():
    made = iter([0.4, 0.8])
    _, ranks = steps([0.2], 8, making=lambda: next(made))
    assert ranks.asked == 2
    assert ranks.own == pytest.approx(0.2 + 0.1)


def test_a_rank_that_stays_slow_is_named_once():
    said, _ = steps([0.2, 0.9], 20)
    assert [(rank, seconds) for rank, seconds, _ in said] == [(2, 0.9)]


def test_a_rank_that_was_slow_for_a_moment_is_not_named():
    said, _ = steps([0.9], 4)
    assert said == []


def test_a_rank_is_compared_with_the_median_of_the_others():
    said, _ = steps([0.2, 0.2, 0.35], 12)
    assert said == []
    said, _ = steps([0.9, 0.9, 0.9], 12)
    assert said == []


def test_what_costs_nothing_is_not_said():
    said, _ = steps([0.002, 0.02], 12, own=0.002)
    assert said == []


def test_on_a_gpu_nothing_is_asked_that_has_not_happened_yet(monkeypatch):
    events = []

    class Event:
        def __init__(self, enable_timing):
            self.happened = True
            events.append(self)

        def record(self): ...

        def query(self):
            return self.happened

        def elapsed_time(self, other):
            assert self.happened
            assert other.happened
            return 200.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    unit, ranks, clock = Unit([0.0], 0.0), Others([0.2]), iter(range(100))
    detector = StragglerDetector([unit], lambda: 0.0, torch.device("cuda"), ranks, 2, print, lambda: next(clock))
    for step in range(4):
        unit(torch.zeros(1))
        if step == 1:  # the loop runs ahead of the device
            events[-1].happened = False
        detector.after_step()
        events[-1].happened = True
        if step == 1:
            assert ranks.own == pytest.approx(0.1)
    assert ranks.own == pytest.approx(0.3)  # with the one that was late
