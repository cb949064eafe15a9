"""Parts of one's own, in a package beside the experiment file and outside of this repository's tree."""

import json
from pathlib import Path

import pytest
import yaml

from areal_ray.cli.main import main as run_cli
from areal_ray.run.metric_names import CLOCK

from .conftest import EXPERIMENT, SMALL

pytestmark = pytest.mark.ray

PARTS = '''
import json
from pathlib import Path

import numpy as np
import torch

from areal_ray.data import next_tokens
from areal_ray.engine import Objective
from areal_ray.engine.objectives import next_token_loss, text_inputs


class StayNear(Objective):
    """Cross entropy, and not too far from what the first weights say."""

    references = ("first",)
    metrics = ("distance",)

    def __init__(self, strength):
        self.strength = strength

    def prepare(self, batch, models):
        return batch | {"first": models["first"](self.model_inputs(batch))}

    def model_inputs(self, batch):
        return text_inputs(batch)

    def weight(self, batch):
        return float((batch["labels"] != -100).sum())

    def loss(self, output, batch):
        distance = (output - batch["first"]).square().mean()
        return next_token_loss(output, batch) + self.strength * distance, {"distance": distance}


def sgd(groups, momentum):
    return torch.optim.SGD(groups, momentum=momentum)


class Rows:
    """Arithmetic sequences: row i counts on from i."""

    def __init__(self, count, seq_len, step):
        self.count, self.seq_len, self.step = count, seq_len, step

    def __len__(self):
        return self.count

    def __getitem__(self, indices):
        input_ids = (indices[:, None] + self.step * np.arange(self.seq_len)[None]) % 256
        return {"input_ids": input_ids, "labels": next_tokens(input_ids), "attention_mask": np.ones_like(input_ids)}

    @property
    def fingerprint(self):
        return f"{self.count}-{self.seq_len}-{self.step}"


def counting(tokenizer, seq_len, rows):
    assert tokenizer.vocab_size == 257
    return Rows(rows, seq_len, 3), Rows(16, seq_len, 5)


class Lines:
    """A tracker: one line of JSON for each logged step."""

    def __init__(self, path):
        self.path = Path(path)

    def read(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def write(self, lines):
        self.path.write_text("".join(json.dumps(line) + "\\n" for line in lines))

    def log(self, step, values):
        self.write([*self.read(), {"step": step, **values}])

    def rewind(self, step):
        self.write([line for line in self.read() if line["step"] <= step])

    def close(self):
        self.path.with_suffix(".closed").touch()


class Broken(Lines):
    def log(self, step, values):
        raise ConnectionError("nobody there")
'''


@pytest.fixture
def experiment(tmp_path):
    """An experiment whose code lies beside it."""
    package = tmp_path / "mine" / "own_parts_of_a_test"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(PARTS)
    values = yaml.safe_load(Path(EXPERIMENT).read_text())
    del values["defaults"]
    values |= {
        "model": {
            "config": {
                "model_type": "qwen3",
                "vocab_size": 264,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            }
        },
        "data": {"source": "own_parts_of_a_test.parts:counting", "args": {"rows": 40}},
        "objective": {"name": "own_parts_of_a_test.parts:StayNear", "args": {"strength": 0.01}},
        "optim": {"factory": "own_parts_of_a_test.parts:sgd", "args": {"momentum": 0.9}, "lr": 0.1, "warmup_steps": 4},
    }
    path = tmp_path / "mine" / "experiment.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def train(ray_cluster, experiment, tmp_path):
    def train(name, *overrides):
        lines = tmp_path / f"{name}.jsonl"
        tracker = f"{{name: 'own_parts_of_a_test.parts:Lines', args: {{path: {lines}}}}}"
        where = [f"run.storage_path={tmp_path / 'runs'}", f"run.name={name}"]
        arguments = [*SMALL, *where, f"trackers=[{tracker}]", *overrides]
        assert run_cli(["train", "--config", str(experiment), *arguments]) == 0
        logged = [json.loads(line) for line in lines.read_text().splitlines()]
        assert lines.with_suffix(".closed").exists()
        run = tmp_path / "runs" / name
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert logged == metrics
        return run, [{k: v for k, v in x.items() if k not in CLOCK} for x in logged]

    return train


def test_objective_optimizer_data_and_tracker_of_one_s_own_end_in_the_same_bits_after_a_kill(train, capfd):
    whole, expected = train("whole")
    killed, logged = train("killed", "checkpoint.async_save=false", "faults=[{kind: sigkill, rank: 1, step: 7}]")
    out = capfd.readouterr().out
    assert "restored step-00000004.a1" in out
    assert "distance" in out
    assert logged == expected
    assert {"loss", "distance", "held_out_loss", "held_out_distance"} <= {*expected[2]}
    assert expected[-1]["distance"] > 0
    last = [str(whole / "step-00000012.a1"), str(killed / "step-00000012.a2")]
    assert run_cli(["ckpt", "diff", *last]) == 0
    assert run_cli(["ckpt", "inspect", last[0]]) == 0
    assert "momentum_buffer" in capfd.readouterr().out


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(train, experiment, tmp_path, capfd):
    broken = f"{{name: 'own_parts_of_a_test.parts:Broken', args: {{path: {tmp_path / 'broken'}}}}}"
    lines = f"{{name: 'own_parts_of_a_test.parts:Lines', args: {{path: {tmp_path / 'short.jsonl'}}}}}"
    train("short", "train.stop_at=6", f"trackers=[{broken}, {lines}]")
    said = "the tracker own_parts_of_a_test.parts:Broken failed, and is left out from now on: ConnectionError: nobody"
    assert capfd.readouterr().out.count(said) == 1


@pytest.mark.parametrize(
    ("override", "part"),
    [
        (
            "objective.name=own_parts_of_a_test.parts:Nothing",
            "objective.name: own_parts_of_a_test.parts has no Nothing",
        ),
        ("objective.args.width=1", "objective.args: own_parts_of_a_test.parts:StayNear failed: TypeError: "),
        ("objective.name=own_parts_of_a_test.parts:sgd", "objective.args: own_parts_of_a_test.parts:sgd failed"),
        ("optim.name=own_parts_of_a_test.gone:sgd", "optim.name: No module named 'own_parts_of_a_test.gone'"),
        ("data.args={rows: 3}", "data.source: 3 rows to train on give 3 sequences"),
        ("trackers=[{name: 'own_parts_of_a_test.parts:None_'}]", "trackers[0].name: own_parts_of_a_test.parts has no"),
    ],
)
def test_what_is_wrong_with_them_is_one_line_that_names_the_key(experiment, tmp_path, override, part, capfd):
    arguments = [*SMALL, f"run.storage_path={tmp_path / 'runs'}", "run.name=wrong", override]
    assert run_cli(["train", "--config", str(experiment), *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert part in line
    assert "experiment.yaml" in line or "command line" in line
    if "gone" in override:
        assert str(experiment.parent) in line  # where it was looked for
