"""Which steps may change the weights, what follows from the others, and that a resumed run decides the same."""

import json
import math

import pytest
import torch
from hypothesis import strategies as st

from areal_ray.config import BadStepConfig, Fault
from areal_ray.distributed import Ranks
from areal_ray.engine import Objective
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.train.bad_steps import BadStepError
from areal_ray.train.faults import Faults
from areal_ray.train.journal import Journal

from .loop_fakes import Steps

pytestmark = pytest.mark.unit

NAN, INF = math.nan, math.inf
SPIKES = BadStepConfig(on_bad="skip", spike_factor=2.0, spike_window=3, max_bad_steps=100)


@pytest.fixture(autouse=True, params=[0, 1], ids=["at once", "a step later"])
def lag(request, monkeypatch):
    """All of it holds for both."""
    monkeypatch.setattr(Steps, "lag", request.param)
    return request.param


@pytest.mark.parametrize(("loss", "grad_norm"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (-INF, 1.0)])
def test_what_is_not_finite_is_refused_and_stops_the_run_by_default(loss, grad_norm):
    run = Steps(BadStepConfig())
    assert run.take(3.0) == (True, False)
    with pytest.raises(
        BadStepError, match=r"^step 2: loss .*, gradient norm .* \(not finite\); it was not taken\. .*skip"
    ):
        run.take(loss, grad_norm)
    assert [(refusal.step, refusal.action) for refusal in run.heard] == [(2, "stop")]
    assert run.guard.state_dict()["left_out"] == []  # the next attempt tries it again


@pytest.mark.parametrize(("action", "back"), [("skip", False), ("rollback", True)])
def test_a_bad_step_is_left_out_for_good(action, back):
    run = Steps(BadStepConfig(on_bad=action))
    run.take(1.0)
    assert run.take(NAN) == (False, back)
    (refusal,) = run.heard
    assert (refusal.step, refusal.grad_norm, refusal.reason, refusal.action) == (2, 1.0, "not finite", action)
    run.step = 1  # the same step once more, good this time
    assert run.take(1.0) == (False, False)
    assert len(run.heard) == 1
    assert run.take(1.0) == (True, False)


def test_a_spike_is_a_multiple_of_the_median_of_the_last_good_losses():
    run = Steps(SPIKES)
    assert run.accepted(9.0, 1.0, 2.0) == [True] * 3
    assert run.accepted(4.0, 4.1, 4.1) == [True, False, False]  # the medians: 2 of (9, 1, 2), then 2 of (1, 2, 4)
    assert run.heard[0].reason == "a spike: the median was 2"
    assert run.accepted(3.9, 7.8, 8.1) == [True, True, False]  # 3.9 of (2, 4, 3.9) and of (4, 3.9, 7.8) is 4


def test_nothing_is_a_spike_before_the_window_is_full():
    assert Steps(SPIKES).accepted(1.0, 50.0, 900.0) == [True] * 3


def test_without_a_factor_any_finite_loss_is_good():
    assert Steps(BadStepConfig(spike_window=1)).accepted(1.0, 1e30) == [True, True]


def test_losses_that_are_not_positive_have_no_spikes():
    assert Steps(SPIKES).accepted(-1.0, -2.0, 0.0, 5.0) == [True] * 4


def test_more_bad_steps_than_allowed_stop_the_run_whatever_is_configured():
    run = Steps(BadStepConfig(on_bad="skip", max_bad_steps=2))
    assert run.accepted(NAN, 1.0, NAN, 1.0) == [False, True, False, True]
    with pytest.raises(BadStepError, match=r"step 5: .* after 2 bad steps .*max_bad_steps above 2"):
        run.take(NAN)
    assert [refusal.action for refusal in run.heard] == ["skip", "skip", "stop"]


def test_the_limit_counts_what_the_state_and_the_ledger_know_each_step_once():
    run = Steps(BadStepConfig(on_bad="skip", max_bad_steps=3), known=[5, 7])
    run.guard.load_state_dict({"losses": [], "left_out": [2, 5]})
    run.step = 9
    with pytest.raises(BadStepError, match="after 3 bad steps"):
        run.take(NAN)


def test_a_state_from_before_there_was_a_guard_is_an_empty_one():
    run = Steps(SPIKES, known=[4])
    run.guard.load_state_dict({})
    assert run.guard.state_dict() == {"losses": [], "left_out": [4]}


def test_going_back_forgets_losses_and_not_what_was_left_out():
    run = Steps(SPIKES)
    run.accepted(1.0, 1.0)
    state = json.loads(json.dumps(run.guard.state_dict()))
    run.accepted(1.5, NAN, 1.5)
    run.guard.load_state_dict(state)
    assert run.guard.state_dict() == {"losses": [1.0, 1.0], "left_out": [4]}


losses = st.lists(st.floats(0.125, 10, width=32) | st.sampled_from([NAN, INF]), max_size=30)


def test_the_ledger_says_what_was_refused_in_numbers_that_can_be_read_back(tmp_path):
    storage, said = RunDir(LocalStorage(tmp_path)), []
    journal = Journal(storage, 3, said.append)
    run = Steps(BadStepConfig(on_bad="skip"))
    run.guard._on_bad_step = lambda refusal: journal.refused(refusal, 16, 8)
    run.take(NAN, 2.5)
    (event,) = storage.events("bad_step")
    assert {**event, "time": 0} == {
        "time": 0,
        "event": "bad_step",
        "attempt": 3,
        "step": 1,
        "loss": "nan",
        "grad_norm": 2.5,
        "reason": "not finite",
        "action": "skip",
        "first_sample": 16,
        "samples": 8,
    }
    assert math.isnan(float(event["loss"]))
    assert said == ["step 1 is bad: loss nan, grad norm 2.5 (not finite); left out"]


class Sum(Objective):
    """The sum of what the model says."""

    def model_inputs(self, batch):
        return batch

    def weight(self, batch):
        return 1.0

    def loss(self, output, batch):
        return output.sum(), {"half": output.sum() / 2}


def test_a_nan_fault_spoils_loss_and_gradients_of_its_step_once(tmp_path):
    run = RunDir(LocalStorage(tmp_path))
    faults = Faults([Fault("nan", 0, 2), Fault("nan", 1, 3)], run, Ranks())
    objective = faults.spoiling(Sum())
    assert (objective.weight({}), objective.model_inputs({"a": 1}), objective.references) == (1.0, {"a": 1}, ())
    seen = []
    for step in (1, 2, 3, 2):
        faults.before_step(step)
        logits = torch.ones(2, requires_grad=True)
        loss, metrics = objective.loss(logits, {})
        assert metrics == {"half": 1.0}
        with torch.no_grad():
            assert not objective.loss(logits, {})[0].isnan()  # of an evaluation after that step
        loss.backward()
        seen.append(bool(logits.grad.isnan().all()))
    assert seen == [False, True, False, False]
    assert [event["step"] for event in run.events("fault")] == [2, 3]
    again = Faults([Fault("nan", 0, 2)], run, Ranks())
    again.before_step(2)
    assert not again.spoiling(Sum()).loss(torch.ones(2), {})[0].isnan()  # it has happened
