"""Loading an experiment: what is resolved, in which order, and what is written down of it."""

import dataclasses
import os
from pathlib import Path

import pytest
import yaml

from areal_ray.config import dump, load

pytestmark = pytest.mark.unit

CONF = Path(__file__).parents[3] / "conf"
TINY = str(CONF / "experiments" / "tiny.yaml")
GOLDEN = Path(__file__).parent / "golden"
# Of those that are told their paths by the environment test_experiments.py has what there is to say.
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiments").glob("*.yaml") if "oc.env" not in path.read_text())
GROUP_FILES = [path for group in ("model", "data", "cluster") for path in sorted((CONF / group).glob("*.yaml"))]
HOW_TO_REWRITE = "if the change is meant: AREAL_RAY_UPDATE_GOLDEN=1 .venv/bin/pytest tests/unit/test_config.py"


def experiment(tmp_path, **files):
    """Write conf files, `experiment` being the experiment; its path."""
    for name, text in files.items():
        folder, _, stem = name.rpartition("__")
        path = tmp_path / "conf" / (folder or "experiments") / f"{stem}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(tmp_path / "conf" / "experiments" / "experiment.yaml")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_resolves_to_its_golden_file(name):
    resolved, golden = dump(load(str(CONF / "experiments" / f"{name}.yaml"))), GOLDEN / f"{name}.yaml"
    if os.environ.get("AREAL_RAY_UPDATE_GOLDEN") == "1":
        golden.write_text(resolved)
    assert golden.exists(), f"{golden} is missing; {HOW_TO_REWRITE}"
    assert resolved == golden.read_text(), HOW_TO_REWRITE


def test_every_golden_file_belongs_to_an_experiment():
    assert sorted(path.stem for path in GOLDEN.glob("*.yaml")) == EXPERIMENTS
    assert "tiny" in EXPERIMENTS


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_group_file_can_be_chosen_and_is_used(path, tmp_path):
    group = path.parent.name
    overrides = [f"{group}={path.stem}"]
    if (group, path.stem) == ("data", "text"):
        overrides.append(f"data.paths=[{tmp_path}]")
    if (group, path.stem) == ("model", "pretrained"):
        overrides.append(f"model.path={tmp_path}")
    section = dataclasses.asdict(getattr(load(TINY, overrides), group))
    values = yaml.safe_load(path.read_text())
    assert values
    assert {key: section[key] for key in values} == values


def test_later_layers_win_over_earlier_ones(tmp_path):
    path = experiment(
        tmp_path,
        cluster__big="{num_workers: 4, max_failures: 7, collective_timeout_s: 60}",
        experiment="""
            defaults: [{cluster: big}]
            cluster: {max_failures: 8, collective_timeout_s: 61}
            model: {config: {model_type: qwen3}}
        """,
    )
    cluster = load(path, ["cluster.collective_timeout_s=62"]).cluster
    assert cluster.use_gpu is False  # the default
    assert (cluster.num_workers, cluster.max_failures, cluster.collective_timeout_s) == (4, 8, 62.0)


def test_of_two_overrides_of_one_key_the_last_wins():
    assert load(TINY, ["train.steps=300", "train.steps=400"]).train.steps == 400


def test_a_group_on_the_command_line_replaces_the_experiment_s_choice(tmp_path):
    path = experiment(
        tmp_path,
        cluster__one="num_workers: 1",
        cluster__four="max_failures: 4",
        experiment="{defaults: [{cluster: one}], model: {config: {model_type: qwen3}}}",
    )
    assert load(path).cluster.num_workers == 1
    chosen = load(path, ["cluster=four"]).cluster
    assert (chosen.num_workers, chosen.max_failures) == (2, 4)  # nothing of `one` is left


def test_overrides_are_read_as_yaml():
    config = load(
        TINY, ["faults=[{kind: sigkill, rank: 1, step: 7}]", "eval.every_steps=null", "optim.betas=[0.8, 0.9]"]
    )
    assert dataclasses.asdict(config.faults[0]) == {"kind": "sigkill", "rank": 1, "step": 7}
    assert config.eval.every_steps is None
    assert config.optim.betas == (0.8, 0.9)


def test_an_override_may_contain_further_equals_signs():
    assert load(TINY, ["run.storage_path=/runs/a=b"]).run.storage_path == "/runs/a=b"


def test_environment_variables_are_resolved_when_loading(monkeypatch):
    monkeypatch.setenv("AREAL_RAY_TEST_PLACE", "/mnt/runs")
    config = load(TINY, ["run.storage_path=${oc.env:AREAL_RAY_TEST_PLACE}/mine"])
    monkeypatch.delenv("AREAL_RAY_TEST_PLACE")
    assert config.run.storage_path == "/mnt/runs/mine"
    assert "storage_path: /mnt/runs/mine" in dump(config)


def test_the_last_step_is_where_this_invocation_ends():
    assert load(TINY).last_step == 200
    assert load(TINY, ["train.stop_at=30"]).last_step == 30


def test_a_config_is_frozen():
    config = load(TINY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train = None


def test_a_dump_loads_back_as_the_same_config(tmp_path):
    config = load(TINY, ["faults=[{kind: exit, rank: 1, step: 7}]", "train.stop_at=9"])
    path = tmp_path / "dumped.yaml"
    path.write_text(dump(config))
    assert load(str(path)) == config


def dumped_args(tmp_path, args):
    path = experiment(tmp_path, experiment=f"model: {{factory: package:function, args: {args}}}")
    return yaml.safe_load(dump(load(path)))["model"]["args"]


@pytest.mark.parametrize("key", ["api_key", "hf_token", "HF_TOKEN", "password", "client_secret", "aws_access_key"])
def test_a_dump_does_not_tell_a_secret(tmp_path, key):
    assert dumped_args(tmp_path, f"{{{key}: hunter2, layers: 3}}") == {key: "***", "layers": 3}


def test_a_dump_does_not_tell_a_password_of_digits(tmp_path):
    assert dumped_args(tmp_path, "{password: 12345, api_key: 678}") == {"password": "***", "api_key": "***"}


def test_a_dump_does_not_tell_a_section_of_secrets(tmp_path):
    assert "hunter2" not in str(dumped_args(tmp_path, "{credentials: {user: me, value: hunter2}}"))


def test_a_dump_tells_the_tokenizer():
    assert yaml.safe_load(dump(load(TINY)))["data"]["tokenizer"] == "bytes"


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id", "max_tokens"])
def test_a_dump_tells_numbers_whatever_their_key(key):
    assert yaml.safe_load(dump(load(TINY, [f"model.config.{key}=256"])))["model"]["config"][key] == 256


@pytest.mark.parametrize("key", ["pad_token", "eos_token", "tokenizer"])
def test_a_dump_tells_special_tokens(tmp_path, key):
    assert dumped_args(tmp_path, f"{{{key}: <text>}}") == {key: "<text>"}


def test_values_may_refer_to_one_another():
    config = load(TINY, ["run.name=mine", "run.storage_path=/runs/${run.name}", "optim.warmup_steps=${eval.batches}"])
    assert (config.run.storage_path, config.optim.warmup_steps) == ("/runs/mine", 8)
