"""Lines of metrics on the screen."""

import pytest

from areal_ray.train.sinks import Console

pytestmark = pytest.mark.unit
VALUES = {"loss": 1.5, "grad_norm": 0.25, "reward": 0.125, "lr": 0.001, "epoch": 0}
VALUES |= {"tokens_per_s": 1234.5, "step_time_s": 0.5, "held_out_loss": 2.0, "held_out_reward": 0.5}


def test_a_step_is_a_line_and_an_evaluation_another():
    said = []
    Console(said.append, 200).log(10, VALUES)
    assert said == [
        "step  10/200  loss 1.5000  grad norm 0.25  reward 0.125  lr 1.00e-03  1,234 tokens/s  0.500 s/step",
        "step  10/200  held out loss 2.0000  held out reward 0.5000",
    ]
    said.clear()
    for waited in (0.05, 0.25):
        Console(said.append, 200).log(10, {**VALUES, "data_s": waited})
    assert ["waiting" in line for line in said[::2]] == [False, True]
    assert said[2].endswith("0.500 s/step  0.250 of them waiting for data")
