"""Keys of text keep what was written, on the command line and in files."""

import pytest
import yaml

from areal_ray.config import ConfigError, load
from areal_ray.config.text import hint_at, keep_text

pytestmark = pytest.mark.unit

MODEL = "model: {config: {model_type: qwen3, hidden_size: 64, num_hidden_layers: 1, vocab_size: 264}}\n"
NAMES = ["12e5678", "007", "3.10", "yes", "0x10", "off", "1_000", "1e3", "2026-11-27", "NaN", "0o17", "true"]


def experiment(tmp_path, text="{}"):
    path = tmp_path / "experiment.yaml"
    path.write_text(MODEL + text)
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_was_written(tmp_path, name):
    assert load(experiment(tmp_path, "run: {seed: 1}"), [f"run.name={name}"]).run.name == name
    assert load(experiment(tmp_path, f"run:\n  name: {name}  # a comment\n")).run.name == name
    assert load(experiment(tmp_path, f"run: {{name: {name}}}\n")).run.name == name


@pytest.mark.parametrize("quoted", ["'007'", '"007"'])
def test_quotes_are_quotes(tmp_path, quoted):
    assert load(experiment(tmp_path, "run: {seed: 1}"), [f"run.name={quoted}"]).run.name == "007"


def test_text_in_dicts_and_lists_too(tmp_path):
    text = "cluster: {env: {A: 007, B: yes, on: on}}\ndata: {source: text, paths: [007, 1e3]}\n"
    config = load(experiment(tmp_path, text))
    assert config.cluster.env == {"A": "007", "B": "yes", "on": "on"}
    assert config.data.paths == ["007", "1e3"]


def test_what_is_no_text_is_read_as_ever(tmp_path):
    text = "train: {steps: 1_000, global_batch_size: 0x10}\noptim: {lr: 1e-3, clip_grad_norm: null, warmup_steps: 0}\n"
    config = load(
        experiment(tmp_path, text), ["engine.compile=yes", "model.config.rope_theta=1e6", "run.s3.region=null"]
    )
    assert (config.train.steps, config.train.global_batch_size) == (1000, 16)
    assert (config.optim.lr, config.optim.clip_grad_norm, config.engine.compile) == (1e-3, None, True)
    assert config.model.config["rope_theta"] == 1e6
    assert config.run.s3.region is None


def test_free_arguments_are_what_yaml_says(tmp_path):
    free = ["model.config.names={1: a}", "model.config.limit=[0.0, .inf]"]
    config = load(experiment(tmp_path, "run: {seed: 1}"), free)
    assert config.model.config["names"] == {1: "a"}
    assert config.model.config["limit"] == [0.0, float("inf")]


def test_what_is_nested_without_end_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="is no YAML"):
        load(experiment(tmp_path), ["model.args=" + "[" * 3000 + "]" * 3000])


def test_anchors_and_interpolations_work(tmp_path):
    text = "run: &run\n  name: 007\n  storage_path: /tmp/${run.name}\ndata: {source: text, paths: ['${run.name}']}\n"
    config = load(experiment(tmp_path, text))
    assert (config.run.name, config.run.storage_path, config.data.paths) == ("007", "/tmp/007", ["007"])


@pytest.mark.parametrize(
    "text",
    [
        *("run.s3.secret_key=!X hidden", "run.s3.secret_key=!!python/name:hidden", "run.s3.secret_key=!hidden"),
        *("run.s3.secret_key=*hidden", "x=[hidden", "x='hidden", "x=&hidden", "x=%hidden", "x=a: *hidden", "x=@hidden"),
    ],
)
def test_what_is_wrong_is_said_without_the_value(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        load(experiment(tmp_path), [text])
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "hint"), [("run.name", str), ("cluster.env.A", str), ("faults[0].step", int), ("no.such.key", None)]
)
def test_the_type_of_a_key(key, hint):
    from typing import Any

    from areal_ray.config import Config

    assert hint_at(Config, key) == (hint or Any)


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "{}", "a: &x {b: 1}\nc: *x\nd: {<<: *x}\n", "a: |\n  two\n  lines\n", "é: ü\n"]
)
def test_yaml_means_what_it_meant(text):
    assert yaml.safe_load(keep_text(text, object)) == yaml.safe_load(text)


def test_auto_saves_need_no_word_about_what_nobody_wrote(tmp_path):
    config = load(experiment(tmp_path, "run: {seed: 1}"), ["checkpoint.every=auto"])
    assert config.checkpoint.every == "auto"
