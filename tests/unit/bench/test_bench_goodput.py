"""Goodput of make bench under kills: a clock that stands between turns, and steps paid for in its time."""

import argparse
from types import SimpleNamespace

import pytest

from tests.bench import goodput
from tests.bench.__main__ import main
from tests.bench.bounds import goodput_beside
from tests.bench.options import Options, arm_and_steps

pytestmark = pytest.mark.unit


class Job:
    """Makes a step a second, saves every fifth, and takes three seconds to start again; on a clock of its own."""

    cluster = None
    RESTART_S, EVERY = 3.0, 5

    def __init__(self, ends_at=float("inf")):
        self.now, self._next, self._step, self._pid, self._lines, self._ends = 0.0, 1.0, 0, 1, [], ends_at
        self.process = SimpleNamespace(poll=lambda: 1 if self.now >= self._ends else None)

    def sleep(self, seconds):
        self.now += seconds
        while self._next <= min(self.now, self._ends) + 1e-9:
            self._step += 1
            self._lines.append({"step": self._step, "time": self._next, "pid": self._pid})
            self._next += 1.0

    def kill(self, pid):
        assert pid == self._pid
        self._pid += 1
        self._step -= self._step % self.EVERY
        self._next = self.now + self.RESTART_S
        return self.now

    def events(self, kind):
        return self._lines


@pytest.fixture
def under(monkeypatch):
    """Has a job run under kills to its end, turn by turn."""

    def run(kills, seconds, job=None):
        job = job or Job()
        monkeypatch.setattr(goodput, "time", SimpleNamespace(time=lambda: job.now, sleep=job.sleep))
        monkeypatch.setattr(goodput, "workers", lambda _: [job._pid])
        monkeypatch.setattr(goodput, "kill", job.kill)
        made = goodput.Run(job, kills, seconds)
        turns = []
        while not made.done:
            before = made.used
            made.turn()
            turns.append(made.used - before)
        return made, turns

    return run


def test_what_is_made_while_the_clock_stands_does_not_count(under):
    made, turns = under([], 40.0)
    assert made.used == 40.0
    assert made.steps == pytest.approx(40, abs=1)
    assert turns[:-1] == pytest.approx([goodput.TURN_S] * (len(turns) - 1), abs=0.2)


def test_a_restart_and_the_steps_that_it_costs_are_paid_for(under):
    made, _ = under([(13.1, 0)], 40.0)
    lost = 4  # of 15 turns' steps, among them two settling ones, the last that was saved is a multiple of five
    assert made.hit == 1
    assert made.curve[0] == (0.0, 0)
    assert made.curve[-1][1] == made.steps
    assert made.curve == sorted(made.curve)
    before, after = (
        next(point for point in order if test(point[0]))
        for order, test in ((made.curve[::-1], lambda at: at < 13.1), (made.curve, lambda at: at > 13.1))
    )
    assert after[0] - before[0] >= Job.RESTART_S
    assert 40 - Job.RESTART_S - lost - 2 <= made.steps <= 40 - Job.RESTART_S + 1


def test_a_turn_with_a_kill_lasts_until_it_trains_again_but_not_for_ever(under, monkeypatch):
    late = goodput.TURN_S - 0.5
    _, turns = under([(late, 0)], 40.0)
    assert turns[0] == pytest.approx(late + Job.RESTART_S + goodput.AGAIN_S, abs=0.3)
    monkeypatch.setattr(Job, "RESTART_S", 100.0)
    _, turns = under([(late, 0)], 40.0)
    assert turns[0] == pytest.approx(goodput.LONGEST_S, abs=0.2)


def test_kills_that_find_nobody_do_not_hit(under, monkeypatch):
    job = Job()
    made, _ = under([(5.0, 0), (6.0, 1)], 20.0, job)
    assert made.hit == 2
    monkeypatch.setattr(goodput, "workers", lambda _: [])
    job = Job()
    monkeypatch.setattr(goodput, "time", SimpleNamespace(time=lambda: job.now, sleep=job.sleep))
    made = goodput.Run(job, [(5.0, 0)], 7.0)
    made.turn()
    assert (made.hit, made.used) == (0, 7.0)


def test_one_that_gives_up_keeps_what_it_has(under):
    made, _ = under([], 40.0, Job(ends_at=12.0))
    assert made.over
    assert made.steps == pytest.approx(11, abs=1)


def test_the_same_seed_gives_the_same_kills():
    assert goodput.schedule(1, 300.0) == goodput.schedule(1, 300.0)
    assert goodput.schedule(1, 100.0) == [kill for kill in goodput.schedule(1, 300.0) if kill[0] < 100.0]
    assert goodput.schedule(1, 300.0) != goodput.schedule(2, 300.0)


@pytest.mark.parametrize(
    ("saves", "said"),
    [
        ({}, ""),
        ({"torchrun-dcp": 10}, ""),
        ({goodput.OURS: 5}, ", saves every 25 and (areal_ray) 5 steps"),
        ({goodput.OURS: 5, "tutorial": 15}, ", saves every 15 and (areal_ray) 5 steps"),
    ],
)
def test_arms_save_as_often_as_asked_and_the_title_says_so(monkeypatch, saves, said):
    asked = []

    def compete(tasks, seed, seconds):
        asked.append({name: task.every for name, task in tasks.items()})
        return {name: SimpleNamespace(steps=100, hit=1, over=False, curve=[(0.0, 0), (9.0, 100)]) for name in tasks}

    monkeypatch.setattr(goodput, "compete", compete)
    shown = goodput.run(Options(rounds=1, only=("tutorial", goodput.OURS), saves=saves))
    assert asked == [{"tutorial": saves.get("tutorial", 25), goodput.OURS: saves.get(goodput.OURS, 25)}]
    assert shown[0]["title"] == goodput_beside("tutorial") + said


@pytest.mark.parametrize("text", ["areal_ray", "areal_ray=", "areal_ray=0", "areal_ray=often", "areal_ray=-5"])
def test_how_often_an_arm_saves_is_asked_in_whole_steps(text):
    with pytest.raises(argparse.ArgumentTypeError, match="as areal_ray=5"):
        arm_and_steps(text)


@pytest.mark.parametrize(
    ("parts", "only", "why"),
    [
        (["restart"], ["areal_ray", "tutorial"], "the part goodput, which is not among these"),
        (["goodput"], ["areal_ray", "torchrun-dcp"], "names tutorial, which --only leaves out"),
    ],
)
def test_how_often_an_arm_saves_is_not_asked_in_vain(monkeypatch, capsys, parts, only, why):
    monkeypatch.setattr("sys.argv", ["bench", *parts, "--saves", "tutorial=15", "--only", *only])
    monkeypatch.setattr("tests.bench.__main__.environment", lambda: pytest.fail("went on"))
    with pytest.raises(SystemExit, match="2"):
        main()
    assert why in capsys.readouterr().err
