"""A checkpoint in whose restore workers die again and again is passed over; other deaths say nothing of it."""

import pytest
import torch
from ray.exceptions import ActorDiedError

from areal_ray.cluster.restore_watch import RestoreWatch
from areal_ray.run import RunDir
from areal_ray.run.restore_deaths import given_up
from areal_ray.storage import LocalStorage
from areal_ray.train.restore import WatchedCatalog
from tests.unit.checkpoint.boxes import save_box

pytestmark = pytest.mark.unit

NEWEST, OLDER = "step-00000020.a1", "step-00000010.a1"


class Life:
    """A run of two checkpoints, start by start."""

    def __init__(self, folder):
        self.run, self.said = RunDir(LocalStorage(folder)), []
        for step in (10, 20):
            save_box(folder, step, weight=torch.zeros(2))
        self.watch = RestoreWatch(self.run, self.said.append)
        self.run.event("submitted", last_step=9, submission="x")
        self.attempt = 1

    def begin(self):
        """A start of the workers, up to the load; what it loads."""
        self.attempt += 1
        self.run.event("attempt", attempt=self.attempt, world_size=1, nodes=["a"], pids=[1])
        return self.restore()

    def restore(self):
        catalog = WatchedCatalog(RunDir(self.run.storage), self.attempt, self.said.append)
        return next(entry.name for entry in catalog.entries() if entry.problem is None)

    def end(self, error=None, lost_node=False):
        self.watch.record({0: error or ActorDiedError()}, lost_node)

    def given_up(self):
        return given_up(self.run.turning_points())


@pytest.fixture
def life(tmp_path):
    return Life(tmp_path)


def test_after_three_deaths_in_its_restore_the_older_one_is_taken(life):
    for _ in range(3):
        assert life.begin() == NEWEST
        life.end()
    assert life.given_up() == {NEWEST: 3}
    assert life.begin() == OLDER
    life.run.event("restored", attempt=life.attempt, step=10)
    assert life.begin() == OLDER  # and stays so
    catalog = WatchedCatalog(life.run, 9, life.said.append)
    problems = {entry.name: entry.problem for entry in catalog.entries()}
    assert problems == {NEWEST: "workers died 3 times in a row while it was being restored", OLDER: None}
    assert f"while {NEWEST} was being restored (3 of 3 times" in life.said[-1]


def test_a_run_that_is_submitted_again_tries_it_again(life):
    for _ in range(3):
        life.begin()
        life.end()
    life.run.event("submitted", last_step=9, submission="y")
    assert life.begin() == NEWEST


def other_error():
    error = RuntimeError("mine")
    error.areal_ray = {"step": None, "time": 1.0}
    return error


OTHERS = {
    "an exception": lambda life: life.end(other_error()),
    "a node that was taken away": lambda life: life.end(lost_node=True),
    "a node that died": lambda life: life.end(ActorDiedError("The actor died because its node has died. Node Id: 1")),
    "after it was restored": lambda life: (life.run.event("restored", attempt=life.attempt, step=20), life.end()),
    "of a hang": lambda life: (
        life.run.event(
            "stuck", attempt=life.attempt, rank=0, waiting=False, seconds=9.0, phase="load", where="x", step=None
        ),
        life.end(),
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_deaths_that_have_nothing_to_do_with_it_do_not_count(life, kind):
    for _ in range(4):
        assert life.begin() == NEWEST
        OTHERS[kind](life)
    assert life.given_up() == {}


def test_a_death_before_the_next_attempt_has_a_number_is_not_counted_twice(life):
    life.begin()
    for _ in range(5):
        life.end()
    assert life.given_up() == {}


def test_deaths_that_are_not_in_a_row_do_not_count(life):
    for _ in range(4):
        for _ in range(2):
            life.begin()
            life.end()
        life.begin()
        life.run.event("restored", attempt=life.attempt, step=20)
        life.end()
    assert life.given_up() == {}
