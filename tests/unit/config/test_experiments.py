"""Every experiment of conf/experiments/: it is what `train` takes, up to the data, which are not prepared here."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from areal_ray.config import ConfigError, load
from areal_ray.data import build_tokenizer
from areal_ray.driver.data import NotPrepared, leave_unprepared
from areal_ray.driver.preflight import prepare
from areal_ray.models import build_model
from tests.unit.data.tokenizer_files import save_tokenizer

pytestmark = pytest.mark.unit

EXPERIMENTS = sorted(Path(__file__).parents[3].glob("conf/experiments/*.yaml"))
# ChatML, what the assistant says marked.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role != 'assistant' %}{{ m.content }}"
    "{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
RECORD = {
    "text": "a",
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "prompt": "a",
    "chosen": "b",
    "rejected": "c",
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What the experiments are told of in variables: a model with a tokenizer, records, text."""
    root = tmp_path_factory.mktemp("given")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 264}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes)).save_pretrained(root / "model")
    tokenizer = build_tokenizer("bytes").transformers()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "model")
    (root / "records.jsonl").write_text(json.dumps(RECORD) + "\n")
    (root / "text.txt").write_text("a")
    records = str(root / "records.jsonl")
    paths = {"DATA": records, "GENERAL": records, "DOMAIN": str(root / "text.txt"), "CORPUS": records}
    return {**paths, "MODEL": str(root / "model"), "TOKENIZER": str(root / "model")}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_it_fits_its_model_and_its_objective(path, given, tmp_path, monkeypatch):
    if "adapter" in yaml.safe_load(path.read_text()):
        pytest.importorskip("peft")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    config = load(str(path), [f"run.storage_path={tmp_path}"])
    assert config.run.name == path.stem
    with pytest.raises(NotPrepared):
        prepare(config, leave_unprepared)


def test_a_teacher_must_know_the_tokens_of_the_run(given, tmp_path, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (path,) = [path for path in EXPERIMENTS if path.stem == "continued_pretraining"]
    shutil.copytree(given["MODEL"], tmp_path / "other")
    save_tokenizer(tmp_path / "other")  # with other special tokens
    for teacher, error in ((given["MODEL"], NotPrepared), (str(tmp_path / "other"), ConfigError)):
        objective = f"objective={{name: distillation, args: {{teacher: {teacher}}}}}"
        with pytest.raises(error) as caught:
            prepare(load(str(path), [f"run.storage_path={tmp_path}", objective]), leave_unprepared)
    assert caught.value.key == "objective.args"
    assert "teacher: " in caught.value.message
    assert "is not the tokenizer of" in caught.value.message


@pytest.mark.parametrize(
    ("name", "billions"), [("pretrain_1gpu", 0.15), ("pretrain_8gpu", 1.4), ("moe", 0.7), ("tiny", 0.003)]
)
def test_a_model_from_nothing_has_the_size_that_it_says(name, billions, given, monkeypatch):
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    (path,) = [path for path in EXPERIMENTS if path.stem == name]
    count = sum(parameter.numel() for parameter in build_model(load(str(path)).model).parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.1)
