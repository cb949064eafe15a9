"""Window: the mean of a logging window, also if the run was interrupted in its middle."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_ray.train.cadence import Cadence
from areal_ray.train.tracking import StepMetrics, Window

pytestmark = pytest.mark.unit

losses = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20)


def test_flush_gives_the_means_and_begins_anew():
    window = Window()
    window.add({"loss": 1.0, "grad_norm": 4.0})
    window.add({"loss": 2.0, "grad_norm": 8.0})
    assert window.flush() == {"loss": 1.5, "grad_norm": 6.0}
    window.add({"loss": 7.0})
    assert window.flush() == {"loss": 7.0}


def test_an_empty_window_has_nothing_to_tell():
    assert Window().flush() == {}


def test_sums_do_not_lose_the_small_beside_the_large():
    window = Window()
    for value in (1e8, 1.0, -1e8, 1.0):  # as float32, 1e8 + 1 is 1e8
        window.add({"loss": value})
    assert window.flush() == {"loss": 0.5}


@given(losses, losses)
def test_a_window_resumed_in_its_middle_has_the_same_mean(before, after):
    undisturbed, first, second = Window(), Window(), Window()
    for value in before:
        first.add({"loss": value})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for value in after:
        second.add({"loss": value})
    for value in before + after:
        undisturbed.add({"loss": value})
    assert second.flush() == undisturbed.flush()


def test_waiting_for_data_is_a_mean_over_the_steps_of_a_line():
    class Sink:
        def log(self, step, values):
            lines.append(values["data_s"])

    lines, waited = [], 0.0
    metrics = StepMetrics(Cadence(2), [Sink()], 100, 1, 1, lambda: waited)
    for step, seconds in ((1, 1.0), (2, 3.0), (3, 0.0), (4, 0.5)):
        metrics.begin_step()
        waited += seconds
        metrics.add({"loss": 1.0})
        metrics.end_step(step, 0, 0.1)
        metrics.write(step)
    assert lines == [2.0, 0.25]


def test_what_lies_between_steps_is_told_apart_from_them(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr("areal_ray.train.tracking.time.perf_counter", lambda: now[0])
    metrics = StepMetrics(
        Cadence(2), [type("Sink", (), {"log": lambda _, step, values: lines.append(values)})()], 6, 4, 40
    )
    for step in range(1, 5):
        metrics.begin_step()
        now[0] += 2.0
        metrics.add({"loss": 1.0})
        metrics.end_step(step, 0, 0.1)
        if step == 2:
            now[0] += 6.0
            metrics.evaluated({"held_out_loss": 1.0})
        metrics.write(step)
        now[0] += 1.0  # a save
    first, second = lines
    assert (first["samples"], first["tokens"]) == (8, 80)
    assert (first["step_time_s"], first["evaluation_s"], first["save_s"], first["left_s"]) == (2.0, 0.0, 0.5, 10.0)
    assert (second["step_time_s"], second["evaluation_s"], second["save_s"]) == (2.0, 3.0, 1.0)


def test_a_state_is_not_changed_by_what_is_added_later():
    window = Window()
    window.add({"loss": 1.0})
    state = window.state_dict()
    other = Window()
    other.load_state_dict(state)
    other.add({"loss": 5.0})
    window.add({"loss": 5.0})
    assert state == {"sums": {"loss": 1.0}, "count": 1}
