"""An error that comes again at the same step ends the run, or is left out with its step."""

import pytest

from .models import train

pytestmark = pytest.mark.ray

# Step 6, as two batches are of the evaluation at the beginning, on rank 1.
POISON = {"calls": 7}
SYNC = "checkpoint.async_save=false"  # the save of step 4 is not news between the first failure and the second


def test_the_same_error_twice_at_one_step_ends_the_run_and_may_be_left_out(run, tmp_path, capfd):
    assert train(run, "poisoned", SYNC, folder=str(tmp_path), **POISON) == 1
    out, panel = capfd.readouterr()
    assert "the same error at step 6 twice, without a new checkpoint in between" in out
    assert "training failed" in panel
    assert "ValueError: a batch that this model cannot take" in panel
    assert "models.py:" in panel
    assert "rank 1 on node" in panel
    assert run.result()["status"] == "failed"
    assert [(event["step"], event["cause"]) for event in run.events("failure")] == [(6, "ValueError")] * 2

    assert train(run, "poisoned", SYNC, "train.skip_poison_steps=true", folder=str(tmp_path), **POISON) == 0
    assert [event["step"] for event in run.events("poison_step")] == [6]
    assert "step 6 has failed 2 times, and is left out from now on" in capfd.readouterr().out
    assert run.result()["status"] == "finished"
    assert run.result()["step"] == 12
    assert [(line["step"], line["skipped"]) for line in run.metrics() if "skipped" in line] == [(6, 1)]
