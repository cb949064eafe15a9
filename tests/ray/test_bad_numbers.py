"""A loss that is not a number, on one worker: the run stops, leaves the step out or goes back, as configured."""

import json

import pytest
import torch

from areal_ray.checkpoint.reader import StoredState
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.ray

SYNC = "checkpoint.async_save=false"  # where it matters that a save is committed before what comes after it
NAN = "{kind: nan, rank: 1, step: 7}"


@pytest.fixture(scope="module")
def skipped(undisturbed, tmp_path_factory):
    """A run that leaves step 7 out, with saves beside the training."""
    run = type(undisturbed)(tmp_path_factory.mktemp("runs"), "skipped")
    assert run.train("train.bad_step.on_bad=skip", f"faults=[{NAN}]") == 0
    return run


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def assert_finite(run):
    """All that is saved and written."""
    checkpoints = sorted(run.path.glob("step-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        stored = StoredState(LocalStorage(checkpoint))
        assert all(torch.isfinite(stored.tensor(name)).all() for name in stored.names)
        for file in ("state.json", "manifest.json"):
            json.loads((checkpoint / file).read_text(), parse_constant=refuse)
    for name in ("metrics.jsonl", "events.jsonl"):
        for line in (run.path / name).read_text().splitlines():
            json.loads(line, parse_constant=refuse)


def bad_steps(run):
    return [(event["step"], event["action"], event["loss"]) for event in run.events("bad_step")]


def test_a_bad_step_is_left_out(skipped, undisturbed):
    result = skipped.result()
    assert (result["status"], result["step"], result["restarts"]) == ("finished", 12, 0)
    assert bad_steps(skipped) == [(7, "skip", "nan")]
    (event,) = skipped.events("bad_step")
    assert (event["first_sample"], event["samples"], event["grad_norm"]) == (48, 8, "nan")
    assert [line["step"] for line in skipped.metrics()] == [0, 3, 6, 9, 12]
    assert skipped.metrics()[:3] == undisturbed.metrics()[:3]
    assert [line.get("skipped") for line in skipped.metrics()] == [None, None, None, 1, None]
    assert_finite(skipped)
    assert skipped.digest() != undisturbed.digest()


def test_going_back_ends_in_the_bits_of_the_run_that_left_the_step_out(skipped, run, capfd):
    assert run.train("train.bad_step.on_bad=rollback", "logging.every_steps=1", f"faults=[{NAN}]") == 0
    assert bad_steps(run) == [(7, "rollback", "nan")]
    assert [(event["step"], event["checkpoint"]) for event in run.events("rolled_back")] == [(4, "step-00000004.a1")]
    assert run.result()["restarts"] == 0
    assert [line["step"] for line in run.metrics()] == list(range(13))
    assert [line["step"] for line in run.metrics() if "loss" not in line] == [0, 7]
    assert_finite(run)
    tensors, expected = (
        StoredState(LocalStorage(x.path / "step-00000012.a1")) for x in (run, skipped)
    )  # their logging, part of the state, is not the same
    assert tensors.names == expected.names
    assert all(torch.equal(tensors.tensor(name), expected.tensor(name)) for name in tensors.names)
    assert tensors.values["guard"] == expected.values["guard"]
    out = capfd.readouterr().out
    assert "step 7 is bad: loss nan, grad norm nan (not finite); going back to the last checkpoint" in out
    assert "restored step-00000004.a1, going on with step 5" in out


def test_a_kill_after_a_bad_step_changes_nothing(skipped, run):
    kill = "{kind: sigkill, rank: 0, step: 8}"
    assert run.train(SYNC, "train.bad_step.on_bad=skip", f"faults=[{NAN}, {kill}]") == 0
    assert [event["step"] for event in run.events("restored")] == [4]
    assert len(run.events("bad_step")) == 1  # step 7 was computed twice, and good the second time
    assert run.metrics() == skipped.metrics()
    assert run.digest() == skipped.digest()


def test_after_going_back_copies_are_taken_to_memory_again(skipped, run):
    kill = "{kind: sigkill, rank: 0, step: 8}"
    memory = "checkpoint.memory_every_steps=5"
    assert run.train(SYNC, memory, "train.bad_step.on_bad=rollback", f"faults=[{NAN}, {kill}]") == 0
    assert [event["memory"] for event in run.events("restored")] == ["step-00000005.a1"]
    assert run.metrics() == skipped.metrics()
    assert run.digest() == skipped.digest()


def test_by_default_a_bad_step_stops_the_run_with_a_panel(run, capfd):
    assert run.train(SYNC, f"faults=[{NAN}]") == 1
    panel = capfd.readouterr().err
    assert "BadStepError: step 7: loss nan, gradient norm nan (not finite)" in panel
    assert "train.bad_step.on_bad=skip" in panel
    assert bad_steps(run) == [(7, "stop", "nan")]
    assert (run.result()["status"], run.result()["checkpoint"]) == ("failed", "step-00000004.a1")
    assert_finite(run)


def test_too_many_bad_steps_stop_the_run(run, capfd):
    nans = ", ".join(f"{{kind: nan, rank: 0, step: {step}}}" for step in (2, 6))
    limit = "train.bad_step.max_bad_steps=1"
    assert run.train("train.bad_step.on_bad=rollback", limit, f"faults=[{nans}]") == 1
    captured = capfd.readouterr()
    assert "there is no checkpoint to go back to: the step is left out" in captured.out
    assert "BadStepError: step 6: loss nan" in captured.err
    assert "max_bad_steps above 1" in captured.err
    assert bad_steps(run) == [(2, "rollback", "nan"), (6, "stop", "nan")]
