"""The learning rate of a run that goes on: when it is another one than before, and what is said of that."""

from dataclasses import asdict

import pytest

from areal_ray.checkpoint.catalog import Entry
from areal_ray.checkpoint.format.manifest import Manifest
from areal_ray.config import load, redact
from areal_ray.driver.rate_jump import rate_jump

pytestmark = pytest.mark.unit
TINY = "conf/experiments/tiny.yaml"  # a cosine over 200 steps


def said(step, before, now):
    """Of a run that was saved at a step under one configuration and goes on under another."""
    info = {"config": redact(asdict(load(TINY, before)))} if before is not None else {}
    return rate_jump(Entry("step", step, 1, Manifest(info, {})), load(TINY, now))


@pytest.mark.parametrize(
    ("step", "before", "now"),
    [
        (100, [], []),
        (100, ["train.stop_at=100"], []),
        (100, [], ["train.steps=210"]),  # a little longer
        (100, ["optim.schedule=constant"], ["optim.schedule=constant", "train.steps=900"]),
        (100, ["optim.schedule=wsd"], ["optim.schedule=wsd", "train.steps=900"]),  # before its decay
        (100, None, ["train.steps=900"]),  # of a version that did not keep its configuration
        (100, [], ["optim.weight_decay=0.5"]),
    ],
)
def test_of_a_rate_that_goes_on_nothing_is_said(step, before, now):
    assert said(step, before, now) is None


@pytest.mark.parametrize(
    ("step", "now", "parts"),
    [
        (200, ["train.steps=400"], ["from 0.0002 to 0.00117 after step 200", "train.steps was 200 and is 400"]),
        (100, ["optim.lr=0.02"], ["optim.lr was 0.002 and is 0.02"]),
        (30, ["optim.warmup_steps=150"], ["optim.warmup_steps was 20 and is 150"]),
        (100, ["optim.schedule=constant"], ["to 0.002 ", "optim.schedule was cosine and is constant"]),
    ],
)
def test_a_jump_is_told_with_what_makes_it_and_what_to_do(step, now, parts):
    text = said(step, [], now)
    assert [part for part in parts if part not in text] == []
    assert "To go on as before, put that back" in text


@pytest.mark.parametrize(("schedule", "advised"), [("cosine", True), ("wsd", False)])
def test_a_schedule_that_is_there_already_is_not_advised(schedule, advised):
    own = [f"optim.schedule={schedule}"]
    text = said(200, own, [*own, "train.steps=900"])
    assert ("optim.schedule=wsd or constant" in text) == advised
    assert "an optim.lr that fits" in text
