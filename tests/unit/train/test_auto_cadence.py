"""Saves as often as they cost and the run fails: the interval, how it is learned, and that one save ends first."""

import math

import pytest

from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.train.cadence import AutoCadence, SaveHistory, save_interval

from .test_cadence import Clock

pytestmark = pytest.mark.unit
DAY = 86400.0


class Tuned:
    """A cadence with a clock of its own, and the events that it tells."""

    def __init__(self, nodes=1, past=None):
        self.clock, self.told = Clock(), []
        self.cadence = AutoCadence(nodes, past or SaveHistory(), self.told.append, clock=self.clock)
        self.cadence.begin()

    def wait(self):
        """Seconds until the next save is due."""
        waited = 0
        while not self.cadence.due(1, 0):
            self.clock.now += 1
            waited += 1
            assert waited < 10_000
        return waited

    def save(self, cost):
        self.cadence.fired(1, 0)
        self.cadence.ended(cost)


@pytest.mark.parametrize(
    ("cost", "mtbf", "interval"),
    [
        (2.0, 3600.0, 120.0),
        (0.5, 100 * DAY, 1800.0),
        (30.0, 60.0, 300.0),
        (0.01, 60.0, 5.0),
        (0.0, 60.0, 5.0),
        (400.0, 100 * DAY, 4000.0),
    ],
    ids=["Young", "at most", "ten times the cost", "at least", "for nothing", "however long"],
)
def test_the_interval_is_youngs_within_bounds(cost, mtbf, interval):
    assert save_interval(cost, mtbf) == pytest.approx(interval)


def test_the_first_save_comes_after_a_minute_and_says_what_saves_cost():
    tuned = Tuned(nodes=1000)
    assert tuned.wait() == 60
    tuned.save(0.5)
    assert tuned.wait() == math.ceil(math.sqrt(2 * 0.5 * 100 * DAY / 1000))
    assert [event["interval_s"] for event in tuned.told] == [60.0, pytest.approx(92.95, abs=0.01)]
    assert tuned.told[-1]["failures"] == 0
    assert tuned.told[-1]["mtbf_s"] == 8640


def test_a_run_that_fails_before_its_first_save_saves_sooner():
    assert Tuned(past=SaveHistory(failures=3, observed_s=90.0)).wait() == math.ceil(30 / 4)
    assert Tuned(past=SaveHistory(failures=3, observed_s=0.0)).wait() == 5


def test_failures_that_were_seen_count_instead_of_the_assumption():
    tuned = Tuned(past=SaveHistory(failures=4, observed_s=4000.0, cost_s=2.0))
    assert tuned.wait() == math.ceil(math.sqrt(2 * 2.0 * 1000))
    for _ in range(200):  # a quiet time
        tuned.wait()
        tuned.save(2.0)
    assert tuned.told[-1]["observed_s"] > 10_000
    assert tuned.told[-1]["interval_s"] > 100
    changes = [
        after["interval_s"] / before["interval_s"] for before, after in zip(tuned.told, tuned.told[1:], strict=False)
    ]
    assert all(change > 1.1 for change in changes)


def test_one_dear_save_is_not_taken_for_the_rule():
    tuned = Tuned(past=SaveHistory(1, 3600.0, 2.0))
    for cost in (30.0, 2.0, 2.0, 2.0):
        tuned.save(cost)
    assert tuned.told[-1]["cost_s"] == 2.0


def test_no_save_begins_before_the_one_before_has_ended():
    tuned = Tuned(past=SaveHistory(1, 60.0, 0.1))
    tuned.wait()
    tuned.cadence.fired(1, 0)
    tuned.clock.now += 10_000
    assert not tuned.cadence.due(2, 0)
    tuned.cadence.ended(None)  # it has failed: tried again at once
    assert tuned.cadence.due(3, 0)


def test_the_other_ranks_do_what_rank_0_says():
    said = []

    def agree(opinion):
        said.append(opinion)
        return True

    other = AutoCadence(2, SaveHistory(), pytest.fail, agree, Clock())
    assert other.due(1, 0)
    assert said == [False]


def test_a_resumed_run_has_waited_already():
    tuned = Tuned()
    tuned.clock.now += 50
    again = Tuned()
    again.cadence.load_state_dict(tuned.cadence.state_dict())
    assert again.wait() == 10


def test_the_past_is_in_the_newest_events(tmp_path):
    run = RunDir(LocalStorage(tmp_path))

    def past():
        return SaveHistory.of(run.newest("save_interval"), run.newest("failure"))

    assert past() == SaveHistory()
    run.event("failure", rank=0)
    assert past() == SaveHistory()  # before anything was trained
    tuned = {"failures": 2, "observed_s": 100.0, "cost_s": 0.5, "mtbf_s": 50.0, "interval_s": 7.0}
    run.event("save_interval", **tuned)
    assert past() == SaveHistory(2, 100.0, 0.5)
    newest = run.newest("save_interval")
    assert SaveHistory.of(newest, {"time": newest["time"] + 30}) == SaveHistory(3, 130.0, 0.5)
    assert SaveHistory.of(newest, {"time": newest["time"] - 30}) == SaveHistory(2, 100.0, 0.5)
