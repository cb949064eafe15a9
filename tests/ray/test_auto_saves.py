"""A run that decides by itself when to save, on a real cluster."""

import pytest

from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints

pytestmark = pytest.mark.ray


def test_it_counts_its_failures_and_ends_as_one_that_is_told_when(undisturbed, run):
    auto = "checkpoint.every=auto", "checkpoint.every_steps=null"
    assert run.train(*auto, "faults=[{kind: sigkill, rank: 1, step: 6}]") == 0
    first, second = (event for event in run.events("save_interval") if event["cost_s"] is None)
    assert (first["attempt"], first["failures"], first["interval_s"]) == (1, 0, 60.0)
    assert (second["attempt"], second["failures"]) == (2, 1)
    assert 0 < second["observed_s"] == second["mtbf_s"]
    ends = [LocalStorage(each.path / each.result()["checkpoint"]) for each in (undisturbed, run)]
    assert {found.name for found in checkpoints.differences(*ends)} <= {"save.last_step"}
    assert run.metrics() == undisturbed.metrics()
