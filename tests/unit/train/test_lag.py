"""A verdict that comes a step later: the same run, and nothing rests on what is not known yet."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from areal_ray.config import BadStepConfig, ConfigError
from areal_ray.engine.scalars import Reading
from areal_ray.run.metric_names import CLOCK
from areal_ray.train import bad_steps
from areal_ray.train.bad_steps import BadStepError

from .loop_fakes import TOTAL, Engine, Steps

pytestmark = pytest.mark.unit

NAN, INF = math.nan, math.inf
SPIKES = BadStepConfig(on_bad="skip", spike_factor=2.0, spike_window=3, max_bad_steps=100)


def lines(job):
    """The metrics lines but for what the clock says."""
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in job.recover.run.metrics()]


losses = st.lists(st.floats(0.125, 10, width=32) | st.sampled_from([NAN, INF]), max_size=30)


def outcome(lag, config, values, windows, settles):
    """Everything that follows from a run's numbers: verdicts, refusals, the state; `settles` are the steps after which
    the host wants to know."""
    run = Steps(replace(config, spike_window=windows), lag=lag)
    known = []
    try:
        for i, value in enumerate(values):
            known += run.judge(*value, now=i % settles == settles - 1)
        known += run.guard.settle(now=True)
    except BadStepError as raised:
        return repr(run.heard), str(raised)
    return repr(run.heard), repr(known), run.guard.state_dict()


# Mostly those that lie at each other's limits, to the last bit: the float32 that is nearest to 1.1 is a little more.
numbers = st.sampled_from([1.0, 1.0, 1.100000023841858, 1.5, 2.0, 3.0, -1.0, NAN]) | st.floats(width=32)


@settings(max_examples=400)
@given(
    st.lists(st.tuples(numbers, st.sampled_from([1.0] * 9 + [NAN, INF])), max_size=25),
    st.integers(1, 6),
    st.sampled_from([1.0000001, 1.1, 1.5, 2.0, 1e300]),
    st.sampled_from(["skip", "stop", "rollback"]),
    st.integers(1, 6),
)
@example([(1.0, 1.0), (1.100000023841858, 1.0)], 1, 1.1, "skip", 3)
def test_the_device_decides_as_the_host_does_and_the_same_follows(values, window, factor, action, settles):
    config = BadStepConfig(on_bad=action, spike_factor=factor, max_bad_steps=12)
    assert outcome(1, config, values, window, settles) == outcome(0, config, values, window, 1)


@given(losses, losses, st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])))
def test_a_run_may_change_its_lag_when_it_goes_on(before, after, lags):
    undisturbed, first, second = Steps(SPIKES, lag=0), Steps(SPIKES, lag=lags[0]), Steps(SPIKES, lag=lags[1])
    expected = undisturbed.accepted(*before, *after)
    decided = first.accepted(*before)
    second.guard.load_state_dict(json.loads(json.dumps(first.guard.state_dict())))
    second.step = len(before)
    assert decided + second.accepted(*after) == expected
    assert second.guard.state_dict() == undisturbed.guard.state_dict()


def test_a_step_later_means_that_the_newest_verdict_stays_open():
    run = Steps(BadStepConfig(on_bad="skip"), lag=1)
    assert run.judge(NAN) == []
    assert run.heard == []
    (judged,) = run.judge(1.0)
    assert (judged.step, judged.verdict) == (1, "skip")
    assert (run.heard[0].step, run.heard[0].samples) == (1, range(8, 16))
    assert [(judged.step, judged.verdict) for judged in run.guard.settle(now=True)] == [(2, "take")]
    assert run.guard.settle(now=True) == []


def test_a_state_is_not_taken_while_a_verdict_is_open():
    run = Steps(BadStepConfig(), lag=1)
    run.judge(1.0)
    with pytest.raises(AssertionError, match="between a step and its verdict"):
        run.guard.state_dict()


def test_what_sends_the_run_back_settles_the_step_after_it_too():
    run = Steps(BadStepConfig(on_bad="rollback"), lag=1)
    run.judge(NAN)
    assert [(judged.step, judged.verdict) for judged in run.judge(INF)] == [(1, "rollback"), (2, "rollback")]
    assert run.guard.state_dict()["left_out"] == [1, 2]


def test_a_stop_leaves_the_step_after_it_unrecorded():
    run = Steps(BadStepConfig(on_bad="stop"), lag=1)
    run.judge(NAN)
    with pytest.raises(BadStepError, match="step 1"):
        run.judge(NAN)
    assert [refusal.step for refusal in run.heard] == [1]


def test_steps_that_were_not_computed_keep_their_place():
    run = Steps(BadStepConfig(on_bad="skip"), known=[2], lag=1)
    run.judge(1.0)
    assert [judged.step for judged in run.judge(1.0)] == [1]
    assert [(judged.step, judged.values) for judged in run.guard.settle(now=True)] == [(2, {})]


@pytest.mark.parametrize("bad", [[1], [2, 3], [7], [10], [13, 14], [21], [22], [5, 6, 7, 8]])
@pytest.mark.parametrize("on_bad", ["skip", "rollback"])
def test_a_verdict_that_comes_a_step_later_makes_the_same_run(start, bad, on_bad):
    jobs = [start(name=f"lag {lag}", engine=spoils(bad), on_bad=on_bad, lag=lag) for lag in (0, 1)]
    assert lines(jobs[1]) == lines(jobs[0])
    assert start.kept["lag 1"] == start.kept["lag 0"]
    assert jobs[1].engine.weight == jobs[0].engine.weight
    assert jobs[1].refused == jobs[0].refused


def test_going_back_a_step_late_computes_the_next_step_once_more_than_needed(start):
    job = start(engine=spoils([9]), on_bad="rollback", evaluate=None)
    assert job.run.began == [*range(1, 10 + start.lag), *range(8, TOTAL + 1)]


def spoils(steps):
    """An engine whose losses at these steps, by the schedule, are not numbers whenever they are computed."""

    class Spoils(Engine):
        def forward_backward(self, batch, objective):
            self.spoiled = [self.calls + 1] if self.schedule + 1 in steps else []
            return super().forward_backward(batch, objective)

        def state_dict(self):
            return super().state_dict() | {"schedule": self.schedule}

        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.schedule = state["schedule"]

    return lambda spoiled: Spoils()


@pytest.mark.parametrize("bad", [8, 9, 10])
def test_leaving_settles_the_last_step_first(start, bad):
    jobs = {}
    for lag in (0, 1):
        start(name=f"lag {lag}", engine=spoils([bad]), lag=lag, leaves_at=9, every=None, log=100, evaluate=None)
        jobs[lag] = start.kept[f"lag {lag}"]
        assert list(jobs[lag]) == [9]
    assert jobs[1] == jobs[0]


def test_leaving_at_a_step_that_sends_the_run_back_is_asked_again_after_it(start):
    job = start(engine=spoils([9]), on_bad="rollback", leaves_at=9, every=4, log=100, evaluate=None)
    # Back at 4 or 8, then 9 is left out, and it is asked again.
    assert job.run.began == [*range(1, 10), 9]
    assert list(start.kept["run"]) == [4, 8, 9]
    assert json.loads(start.kept["run"][9])["guard"]["left_out"] == [9]


def test_a_stop_comes_a_step_later_and_nothing_of_it_was_saved(start):
    with pytest.raises(BadStepError, match="step 10"):
        start(spoiled=[10], on_bad="stop", copy=1, log=100, evaluate=None)
    (job,) = start.jobs
    assert job.run.began[-1] == 10  # a copy that is due after every step has it settled at once
    assert job.recover.copied[-1] == 9
    with pytest.raises(BadStepError, match="step 10"):
        start(name="other", spoiled=[10], on_bad="stop", log=100, evaluate=None)
    assert start.jobs[1].run.began[-1] == 10 + start.lag
    assert list(start.kept["other"]) == [7]


def test_nothing_is_read_of_a_step_before_the_next_one_is_queued(start, monkeypatch):
    """With a lag; and at once where a line, an evaluation, a save or the end is due."""
    seen = []

    class Watched(Reading):
        def values(self):
            seen.append(("read", len(seen)))
            return super().values()

    class Queues(Engine):
        def optimizer_step(self, refused=None):
            super().optimizer_step(refused)
            seen.append(("queued", len(seen)))

    monkeypatch.setattr(bad_steps, "Reading", Watched)
    start(last_step=6, engine=Queues, evaluate=None, log=4)
    order = "".join(what[0] for what, _ in seen)
    assert order == ("rqrqrqrqrqrq", "qqrqrqrrqqrr")[start.lag]  # all of it is known after steps 4 and 6


def test_a_lag_needs_an_optimizer_that_can_be_told_on_the_device(start):
    class Cannot(Engine):
        skips_on_device = False

    with pytest.raises(ConfigError, match=r"needs an optimizer .* adamw makes one that cannot") as caught:
        start(engine=Cannot, lag=1)
    assert caught.value.key == "train.bad_step.lag"
    start(engine=Cannot, lag=0)
