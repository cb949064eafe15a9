"""Several held-out sets: each at its cadence, under its name, with what is told beside the loss."""

import json
import math

import numpy as np
import pytest
import torch

from areal_ray.config import ConfigError, DataConfig, EvalConfig, EvalSetConfig, EvaluatorConfig, load
from areal_ray.data import PackedTokens, build_tokenizer
from areal_ray.data.rendering.special import prompt_ids
from areal_ray.engine import Objective
from areal_ray.engine.hidden import Hidden
from areal_ray.engine.next_token import NextToken
from areal_ray.engine.objectives import LanguageModeling
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.train.generation import texts
from areal_ray.train.own_evaluation import build_evaluator
from tests.unit.config.test_config import TINY

from .test_loop import lines

pytestmark = pytest.mark.unit
OTHER = PackedTokens(np.arange(12, dtype=np.uint16), 2)  # 6 rows: one global batch of 4


def test_each_set_is_evaluated_at_its_cadence_and_all_at_the_beginning_and_the_end(start):
    sets = {"code": EvalSetConfig(every_steps=6), "notes": EvalSetConfig()}
    whole = start(name="whole", sets={"code": OTHER, "notes": OTHER}, evaluation=EvalConfig(5, 2, sets=sets))
    steps = {
        name: [line["step"] for line in lines(whole) if name in line]
        for name in ("held_out_loss", "held_out/code/loss", "held_out/notes/loss")
    }
    assert steps == {
        "held_out_loss": [0, 5, 10, 15, 20, 22],
        "held_out/code/loss": [0, 6, 12, 18, 22],
        "held_out/notes/loss": [0, 5, 10, 15, 20, 22],
    }
    assert whole.progress.metrics.keys() == {"held_out_loss", "held_out/code/loss", "held_out/notes/loss", "loss"}
    # Of 6 rows there is one batch in which none comes twice; what is held out is cycled through, as ever.
    assert whole.engine.evaluated == 6 * 2 + 5 + 6
    for death in (5, 6, 13):
        start(dies_at=death, sets={"code": OTHER, "notes": OTHER}, evaluation=EvalConfig(5, 2, sets=sets))
    again = start(sets={"code": OTHER, "notes": OTHER}, evaluation=EvalConfig(5, 2, sets=sets))
    assert lines(again) == lines(whole)
    assert start.kept["run"] == start.kept["whole"]


def test_a_set_with_a_cadence_needs_no_other(start):
    job = start(sets={"code": OTHER}, evaluation=EvalConfig(None, sets={"code": EvalSetConfig(every_steps=8)}))
    assert [line["step"] for line in lines(job) if "held_out/code/loss" in line] == [0, 8, 16, 22]
    assert not any("held_out_loss" in line for line in lines(job))


class Weighs:
    """An evaluator of one's own."""

    def __init__(self, times=1):
        self.times = times

    def __call__(self, evaluated):
        assert evaluated.tokenizer.vocab_size == 257
        return {"weight": evaluated.engine.weight * self.times, "step": evaluated.step}


NAME = "tests.unit.train.test_evaluations:Weighs"


def test_an_evaluator_of_one_s_own_gives_metrics_at_its_cadence(start):
    own = [EvaluatorConfig(NAME, args={"times": 2}, every_steps=8), EvaluatorConfig(NAME, label="once")]
    job = start(evaluation=EvalConfig(10, 1, evaluators=own))
    there = {line["step"]: line for line in lines(job) if "held_out/Weighs/step" in line}
    assert list(there) == [0, 8, 16, 22]
    assert all(line["held_out/Weighs/step"] == step for step, line in there.items())
    assert there[22]["held_out/Weighs/weight"] == 2 * job.engine.weight == 2 * there[22]["held_out/once/weight"]
    assert [line["step"] for line in lines(job) if "held_out/once/step" in line] == [0, 10, 20, 22]
    phases = {phase for phase in job.run.phases if "evaluat" in phase}
    assert phases == {"evaluate", "other evaluation"}  # which may take as long as it likes
    with pytest.raises(ConfigError, match="unexpected keyword argument"):
        build_evaluator(EvaluatorConfig(NAME, args={"time": 2}), "eval.evaluators[0]")
    with pytest.raises(ConfigError, match="cannot be called"):
        build_evaluator(EvaluatorConfig("builtins:dict"), "eval.evaluators[0]")


def test_generations_are_written_by_step_with_their_text(tmp_path):
    run = RunDir(LocalStorage(tmp_path))
    config = DataConfig()
    tokenizer = build_tokenizer("bytes")
    ids = prompt_ids(config, tokenizer, ["ab", "ü"], chat=False)
    assert ids == [[97, 98], [0xC3, 0xBC]]
    made = texts(["ab", "ü"], [[99, 100, 256], [0xC3]], [256], tokenizer.transformers().decode)
    run.write_generations(7, made)
    found = json.loads((tmp_path / "generations" / "step-00000007.json").read_text())
    assert found["step"] == 7
    assert found["generations"][0] == {"prompt": "ab", "text": "cd", "tokens": [99, 100, 256], "ended": True}
    assert not found["generations"][1]["ended"]
    with pytest.raises(ConfigError, match="has none: name a file"):
        prompt_ids(config, tokenizer, ["ab"], chat=True)


def logits_and_hidden():
    torch.manual_seed(0)
    states, weight, bias = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randn(11)
    labels = torch.randint(0, 11, (2, 5))
    labels[0, :2], labels[1, 4] = -100, -100
    logits = states @ weight.T + bias
    labels[1, :2] = logits[1, :2].argmax(-1)  # two that are right, at least
    return logits, Hidden(states, weight, bias), Hidden(states, weight, bias, lambda x: -x), labels


def test_accuracy_and_bytes_are_means_over_predicted_tokens_with_and_without_logits(monkeypatch):
    monkeypatch.setattr("areal_ray.engine.hidden.CHUNK_BYTES", 4 * 11 * 3)  # three rows at a time
    logits, hidden, negated, labels = logits_and_hidden()
    lengths = torch.arange(11) % 4
    batch = {"input_ids": labels.clamp(min=0), "labels": labels}
    scored = NextToken(LanguageModeling(), ["perplexity", "bits_per_byte", "accuracy"], lengths)
    assert scored.metrics == ("accuracy", "bytes_per_token")
    kept = labels[labels != -100]
    right = (logits.argmax(-1) == labels).sum() / len(kept)
    assert right >= 2 / 7
    for output in (logits, hidden):
        loss, values = scored.loss(output, batch)
        assert float(values["accuracy"]) == pytest.approx(float(right))
        assert float(values["bytes_per_token"]) == pytest.approx(float(lengths[kept].float().mean()))
        assert float(loss) == pytest.approx(float(LanguageModeling().loss(logits, batch)[0]))
    _, values = scored.loss(negated, batch)
    assert float(values["accuracy"]) == pytest.approx(float(((-logits).argmax(-1) == labels).sum() / len(kept)))


class WithAccuracy(LanguageModeling):
    metrics = ("accuracy", "perplexity")

    def loss(self, output, batch):
        loss, others = super().loss(output, batch)
        return loss, {**others, "accuracy": torch.tensor(0.25), "perplexity": torch.tensor(7.0)}


def test_what_an_objective_says_itself_is_neither_asked_twice_nor_overwritten():
    logits, _, _, labels = logits_and_hidden()
    scored = NextToken(WithAccuracy(), ["perplexity", "bits_per_byte", "accuracy"], torch.ones(11))
    assert scored.metrics == ("accuracy", "perplexity", "bytes_per_token")
    loss, values = scored.loss(logits, {"input_ids": labels.clamp(min=0), "labels": labels})
    told = scored.derive({"loss": float(loss), **{name: float(value) for name, value in values.items()}})
    assert (told["accuracy"], told["perplexity"]) == (0.25, 7.0)
    assert set(told) == {"loss", "accuracy", "perplexity", "bits_per_byte"}


def test_bits_per_byte_and_perplexity_follow_from_the_means():
    scored = NextToken(LanguageModeling(), ["perplexity", "bits_per_byte"], torch.ones(3))
    told = scored.derive({"loss": 3 * math.log(2), "bytes_per_token": 1.5})
    assert told == {"loss": 3 * math.log(2), "perplexity": pytest.approx(8), "bits_per_byte": pytest.approx(2)}
    assert "bits_per_byte" not in scored.derive({"loss": 1.0, "bytes_per_token": 0.0})
    assert math.isfinite(scored.derive({"loss": 1e6, "bytes_per_token": 1.0})["perplexity"])
    assert issubclass(NextToken, Objective)


SET = "eval.sets={a: {source: text, paths: [/tmp/x]}}"


@pytest.mark.parametrize(
    ("overrides", "key", "text"),
    [
        (["eval.sets={a/b: {}}"], "eval.sets", "must be letters"),
        (["eval.sets={a: {source: text}}"], "eval.sets.a.paths", "needs files"),
        (["eval.sets={a: {held_out: 0.1}}"], "eval.sets.a.held_out", "all documents"),
        (["eval.sets={a: {every_steps: 0}}"], "eval.sets.a.every_steps", "greater than 0"),
        ([SET, "eval.every_steps=null"], "eval.sets.a.every_steps", "never be due"),
        ([SET, "eval.sets.a.format=preference"], "eval.sets.a.format", "no records|cannot be evaluated"),
        (["eval.metrics=[bleu]"], "eval.metrics", "knows perplexity"),
        (["eval.metrics=[accuracy]", "objective.name=mine:One"], "eval.metrics", "objective of your own"),
        (["checkpoint.keep={last: 1, best: 1, metric: held_out/a/loss}"], "checkpoint.keep.metric", "must be"),
        (["eval.generate={prompts: []}"], "eval.generate.prompts", "one at least"),
        (["eval.generate={prompts: [a], temperature: -1}"], "eval.generate.temperature", "0 or more"),
        (["eval.early_stopping={metric: held_out_accuracy}"], "eval.early_stopping.metric", "must be held_out_loss"),
        (["eval.early_stopping={}", "eval.every_steps=null"], "eval.early_stopping.metric", "needs eval.every_steps"),
        (["eval.evaluators=[{name: mine}]"], "eval.evaluators[0].name", "package.module:name"),
        (["eval.evaluators=[{name: 'a:b'}, {name: 'c:b'}]"], "eval.evaluators[1].label", "another evaluator"),
        (["export={at_end: false}"], "export", "nothing would be exported"),
        (["export={model_class: a:b}"], "export.model_class", "model.factory"),
        (["export={keep: 0}"], "export.keep", "greater than 0"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(overrides, key, text):
    with pytest.raises(ConfigError, match=text) as caught:
        load(TINY, overrides)
    assert caught.value.key == key


def test_metrics_of_sets_can_be_kept_by_and_stopped_on():
    keep = "checkpoint.keep={last: 1, best: 1, metric: held_out/a/accuracy, mode: max}"
    config = load(TINY, [SET, keep, "eval.metrics=[accuracy]", "eval.early_stopping={metric: held_out/a/loss}"])
    assert list(config.corpora) == ["", "eval/a"]
    rows = config.corpora["eval/a"]
    assert (rows.source, rows.held_out, rows.tokenizer) == ("text", 0.0, config.data.tokenizer)
