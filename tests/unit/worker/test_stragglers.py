"""Which rank is slow."""

import time

import pytest
import torch
from torch import nn

from areal_ray.worker import stragglers
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

    def gather(self, own):
        self.asked += 1
        self.own = own
        return [own, *self.others]


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stragglers.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(stragglers.time, "monotonic", lambda: now[0])
    yield now
    assert time is stragglers.time


def steps(clock, others, count, own=0.2, making=lambda: 0.0, every=4):
    said = []
    unit = Unit(clock, own)
    ranks = Others(others)
    watch = StragglerDetector([unit], making, torch.device("cpu"), ranks, every, lambda *what: said.append(what))
    for _ in range(count):
        unit(torch.zeros(1))
        clock[0] += 0.3  # waiting, which is not its own
        watch.after_step()
    return said, ranks


def test_own_time_is_that_of_the_units_and_of_the_data_and_not_of_waiting(clock):
    made = iter([0.4, 0.8])
    _, ranks = steps(clock, [0.2], 8, making=lambda: next(made))
    assert ranks.asked == 2
    assert ranks.own == pytest.approx(0.2 + 0.1)


def test_a_rank_that_stays_slow_is_named_once(clock):
    said, _ = steps(clock, [0.2, 0.9], 20)
    assert [(rank, seconds) for rank, seconds, _ in said] == [(2, 0.9)]


def test_a_rank_that_was_slow_for_a_moment_is_not_named(clock):
    said, _ = steps(clock, [0.9], 4)
    assert said == []


def test_a_rank_is_compared_with_the_median_of_the_others(clock):
    said, _ = steps(clock, [0.2, 0.2, 0.35], 12)
    assert said == []
    said, _ = steps(clock, [0.9, 0.9, 0.9], 12)
    assert said == []


def test_what_costs_nothing_is_not_said(clock):
    said, _ = steps(clock, [0.002, 0.02], 12, own=0.002)
    assert said == []
