"""Several held-out sets: each at its cadence, under its name, with what is told beside the loss."""

import math

import numpy as np
import pytest
import torch

from areal_ray.config import ConfigError, EvalConfig, EvalSetConfig, load
from areal_ray.data import PackedTokens
from areal_ray.engine import Objective
from areal_ray.engine.hidden import Hidden
from areal_ray.engine.next_token import NextToken
from areal_ray.engine.objectives import LanguageModeling
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
