"""Early stopping: when it ends a run, and that a run which died in between ends at the same step."""

import pytest
import torch

from areal_ray.config import EarlyStoppingConfig, EvalConfig
from areal_ray.engine import EvalResult
from areal_ray.train.early_stopping import EarlyStopping

from .loop_fakes import TOTAL, Engine
from .test_loop import lines

pytestmark = pytest.mark.unit


def steps_until(values, **rule):
    stopping = EarlyStopping(EarlyStoppingConfig("loss", **rule))
    for step, value in enumerate(values):
        stopping.see(step, {} if value is None else {"loss": value})
        if stopping.reached:
            return step
    return None


@pytest.mark.parametrize(
    ("values", "rule", "stop"),
    [
        ([5, 4, 3, 2, 1], {"patience": 1}, None),
        ([5, 4, 4, 3], {"patience": 1}, 2),
        ([5, 4, 4, 3, 3, 3], {"patience": 2}, 5),
        ([5, 4, None, None, 3], {"patience": 1}, None),  # not evaluated then
        ([5, 4.9, 4.8, 4.7], {"patience": 2, "min_delta": 0.25}, 2),  # all of them together would be enough
        ([5, 6, 7], {"patience": 1, "mode": "max"}, None),
        ([5, 6, 6], {"patience": 1, "mode": "max"}, 2),
        ([float("nan"), float("nan"), 5], {"patience": 2}, 1),
        ([5, float("-inf"), 4], {"patience": 2}, None),
    ],
)
def test_it_ends_after_so_many_evaluations_without_a_better_one(values, rule, stop):
    assert steps_until(values, **rule) == stop


def test_what_was_seen_of_another_metric_does_not_count():
    seen = EarlyStopping(EarlyStoppingConfig("loss", patience=3))
    for step in range(3):
        seen.see(step, {"loss": 1.0})
    other = EarlyStopping(EarlyStoppingConfig("accuracy", patience=3))
    other.load_state_dict(seen.state_dict())
    other.see(4, {"accuracy": 2.0})
    assert other.state_dict() == {"metric": "accuracy", "best": 2.0, "best_step": 4, "without": 0}
    other.load_state_dict({})  # of a checkpoint that was saved without a rule
    assert other.state_dict() == {"metric": "accuracy", "best": None, "best_step": 0, "without": 0}


class Worse(Engine):
    """Gets better until step 8, and worse from then on."""

    def state_dict(self):
        return {**super().state_dict(), "schedule": self.schedule}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.schedule = state["schedule"]

    def evaluate(self, batch, objective):
        super().evaluate(batch, objective)
        loss = torch.tensor(abs(self.schedule - 8.0) + 1, dtype=torch.float64)
        return EvalResult(loss, torch.tensor(1.0))


STOPS = EvalConfig(4, 1, early_stopping=EarlyStoppingConfig(patience=2))


def test_the_run_ends_with_a_checkpoint_and_goes_on_with_more_patience(start):
    job = start(engine=Worse, evaluation=STOPS)
    assert job.stopping.reached
    assert job.recover.steps == [7, 14, 16]
    assert job.recover.musts[-1]
    assert [line["step"] for line in lines(job) if "held_out_loss" in line] == [0, 4, 8, 12, 16]
    event = job.recover.run.newest("stopped_early")
    assert (event["step"], event["metric"], event["best_step"]) == (16, "held_out_loss", 8)
    again = start(engine=Worse, evaluation=STOPS)
    assert (again.run.began, again.recover.steps) == ([], [])
    more = EvalConfig(4, 1, early_stopping=EarlyStoppingConfig(patience=3))
    assert start(engine=Worse, evaluation=more).recover.steps == [20]
    assert start(engine=Worse, evaluation=EvalConfig(4, 1)).recover.steps == [21, TOTAL]


@pytest.mark.parametrize("death", [5, 9, 13, 15, 16])
def test_one_that_died_ends_as_one_that_did_not(start, death):
    whole = start(name="whole", engine=Worse, evaluation=STOPS)
    start(dies_at=death, engine=Worse, evaluation=STOPS)
    assert lines(start(engine=Worse, evaluation=STOPS)) == lines(whole)
    assert start.kept["run"] == start.kept["whole"]


def test_without_a_rule_nothing_of_it_is_saved(start):
    start()
    assert all('"early_stopping"' not in state for state in start.kept["run"].values())
