"""Averages of the weights are evaluated beside the weights, when nothing copies these any more."""

from contextlib import contextmanager

import pytest
import torch

from areal_ray.engine import EvalResult
from areal_ray.train.averaged_evaluation import AveragingEvaluator

pytestmark = pytest.mark.unit


class Engine:
    """Its loss is 2, with averages 1; what was done."""

    def __init__(self):
        self.loss, self.done = 2.0, []

    def evaluate(self, batch, objective):
        self.done.append(self.loss)
        return EvalResult(torch.tensor(self.loss), torch.tensor(4.0), {"accuracy": torch.tensor(self.loss / 4)})

    @contextmanager
    def averaged(self):
        self.done.append("averages")
        self.loss = 1.0
        yield
        self.loss = 2.0


class Batches:
    def __next__(self):
        return {}

    def close(self): ...


def test_both_are_evaluated_on_the_same_number_of_batches():
    engine = Engine()

    def wait():
        engine.done.append("waited")

    found = AveragingEvaluator(engine, Batches, 2, None, averaged=engine.averaged, wait_for_copy=wait).run()
    assert found == {
        "held_out_loss": 2.0,
        "held_out_accuracy": 0.5,
        "ema_held_out_loss": 1.0,
        "ema_held_out_accuracy": 0.25,
    }
    assert engine.done == [2.0, 2.0, "waited", "averages", 1.0, 1.0]
    assert engine.loss == 2.0
