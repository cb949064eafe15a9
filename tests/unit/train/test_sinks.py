"""Where metrics go: lines for the screen, and trackers that fail without harm."""

import threading

import pytest

from areal_ray.config import ConfigError, TrackerConfig
from areal_ray.train.sinks import Console, Tracker, build_tracker

pytestmark = pytest.mark.unit
VALUES = {"loss": 1.5, "grad_norm": 0.25, "reward": 0.125, "lr": 0.001, "epoch": 0}
VALUES |= {"tokens_per_s": 1234.5, "step_time_s": 0.5, "held_out_loss": 2.0, "held_out_reward": 0.5}


class Kept:
    """A tracker that keeps what it is told, and fails when it is told to."""

    def __init__(self, fails=""):
        self.fails, self.calls = fails, []
        self.told("make")

    def told(self, what, *args):
        self.calls.append((what, *args))
        if what == self.fails:
            raise ConnectionError("nobody there")

    def log(self, step, values):
        self.told("log", step)

    def rewind(self, step):
        self.told("rewind", step)

    def close(self):
        self.told("close")


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


@pytest.mark.parametrize("fails", ["make", "log", "rewind", "close"])
def test_a_tracker_that_fails_is_left_out_and_said_once(fails):
    said, made = [], []

    def make():
        made.append(Kept.__new__(Kept))
        made[0].__init__(fails)
        return made[0]

    tracker = Tracker("mine:Kept", make, said.append)
    for _ in range(2):
        tracker.log(1, VALUES)
        tracker.rewind(0)
    tracker.close()
    line = "the tracker mine:Kept failed, and is left out from now on: ConnectionError: nobody there"
    assert said == [line]
    assert made[0].calls[-1][0] == fails


def test_an_end_that_takes_too_long_is_not_waited_for():
    said, end = [], threading.Event()
    kept = Kept()
    kept.close = end.wait
    Tracker("mine:Kept", lambda: kept, said.append, close_s=0.01).close()
    end.set()
    assert said == ["the tracker mine:Kept has not closed in 0 s"]


def test_a_tracker_is_made_with_its_args():
    tracker = build_tracker(TrackerConfig(f"{__name__}:Kept", {"fails": "log"}), "trackers[0]", print)
    assert tracker._sink.fails == "log"
    with pytest.raises(ConfigError, match="has no Nothing") as caught:
        build_tracker(TrackerConfig(f"{__name__}:Nothing"), "trackers[0]", print)
    assert caught.value.key == "trackers[0].name"
