"""Lines of metrics on the screen."""

import pytest

from areal_ray.train.sinks import Console, Pulse

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


def test_a_terminal_is_told_as_often_as_one_can_read_it():
    told, now = [], [100.0]
    pulse = Pulse(told.append, 200, clock=lambda: now[0])
    for step in range(1, 9):
        pulse.beat(step)
        now[0] += 0.25
    assert [news["step"] for news in told] == [1, 5]
    assert told[0] == {"step": 1, "steps": 200}
    pulse.log(8, {**VALUES, "left_s": 60.0})
    pulse.log(8, {"held_out_loss": 1.0})
    pulse.beat(9)
    now[0] += 1.5
    pulse.beat(10)
    assert [news["step"] for news in told[2:]] == [8, 10]
    assert told[-1] == {"step": 10, "steps": 200, "loss": 1.5, "tokens_per_s": 1234.5, "left_s": 58.5}
