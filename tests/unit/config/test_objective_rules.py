"""Which objective goes with which data."""

import pytest

from areal_ray.config import ConfigError, load
from areal_ray.config.objective_rules import OBJECTIVES
from areal_ray.engine.objectives import BUILTIN, build_objective

pytestmark = pytest.mark.unit

PAIRS = ("data.source=jsonl", "data.paths=[a]", "data.format=preference", "data.packing=none")
CHATS = "{name: chats, source: jsonl, paths: [a], format: messages}"
TEXT = "{name: text, source: stdlib}"


def experiment(name, *overrides):
    return load("conf/experiments/tiny.yaml", [f"objective.name={name}", *overrides])


def test_the_names_are_those_that_there_are():
    assert set(OBJECTIVES) == set(BUILTIN)
    with pytest.raises(ConfigError, match=r"knows language_modeling, sft, dpo, distillation, or package\.module:name"):
        experiment("kto")


@pytest.mark.parametrize(
    ("name", "overrides", "text"),
    [
        ("dpo", [], "records of data.format=text have not: data.format=preference data.packing=none"),
        ("sft", [], "in text there are none: data.format=messages or completion"),
        ("sft", ["data.source=text", f"data.mixture=[{TEXT}]", "data.source=stdlib"], "in text there are none"),
    ],
)
def test_data_without_what_the_objective_is_about_are_refused(name, overrides, text):
    with pytest.raises(ConfigError, match=text) as caught:
        experiment(name, *overrides)
    assert caught.value.key == "objective.name"


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("dpo", PAIRS),
        ("sft", PAIRS),
        ("sft", ["data.format=completion"]),
        ("sft", [f"data.mixture=[{TEXT}, {CHATS}]"]),
        ("dpo", ["data.source=package.module:rows"]),
        ("sft", ["data.source=package.module:rows"]),
        ("distillation", []),
    ],
)
def test_data_with_it_are_taken_and_of_ones_own_nothing_is_known(name, overrides):
    assert experiment(name, *overrides).objective.name == name


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("language_modeling", ["objective.args.z_loss=0.1"]),
        ("dpo", PAIRS),
        ("distillation", ["objective.args.teacher=/somewhere"]),
    ],
)
def test_checkpoints_can_be_kept_by_each_of_its_metrics(name, overrides):
    objective = build_objective(experiment(name, *overrides).objective)
    assert objective.metrics
    for metric in objective.metrics:
        experiment(name, *overrides, f"checkpoint.keep={{last: 1, best: 1, metric: held_out_{metric}}}")
    with pytest.raises(ConfigError, match="must be held_out_loss or"):
        experiment(name, *overrides, "checkpoint.keep={last: 1, best: 1, metric: held_out_other}")
