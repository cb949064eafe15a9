"""Direct preference optimization: its losses by the papers' formulas, its rows, its arguments."""

import math

import pytest
import torch

from areal_ray.config import ConfigError, ObjectiveConfig
from areal_ray.engine import hidden
from areal_ray.engine.hidden import Hidden
from areal_ray.engine.objectives import DirectPreference, build_objective
from areal_ray.engine.objectives.dpo import in_one

pytestmark = pytest.mark.unit

VOCABULARY, WIDTH, BETA = 20, 8, 0.4


def pairs():
    """Three pairs: a prompt of two tokens, answers of different lengths, the rejected ones in wider rows."""
    generator = torch.Generator().manual_seed(0)
    batch = {}
    for before, width, lengths in (("", 6, (6, 4, 3)), ("rejected_", 8, (5, 8, 3))):
        ids = torch.randint(0, VOCABULARY, (3, width), generator=generator)
        place = torch.arange(width)
        mask = (place < torch.tensor(lengths)[:, None]).long()
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:].masked_fill((mask[:, 1:] == 0) | (place[1:] < 2), -100)
        batch |= {f"{before}input_ids": ids, f"{before}labels": labels, f"{before}attention_mask": mask}
    return batch


class Table:
    """A frozen model whose logits follow from the token alone."""

    def __init__(self, seed):
        self.logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def log_probs(self, inputs, labels):
        said = self.logits[inputs["input_ids"]].log_softmax(-1)
        return said.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)


def by_hand(policy, reference, batch, average):
    """log p - log p_ref of each answer, token by token: two lists of tensors."""
    gains = []
    for before in ("", "rejected_"):
        rows = []
        for ids, labels in zip(batch[f"{before}input_ids"], batch[f"{before}labels"], strict=True):
            at = [(int(a), int(b)) for a, b in zip(ids, labels, strict=True) if b != -100]
            gain = sum((policy.log_softmax(-1) - reference.log_softmax(-1))[a, b] for a, b in at)
            rows.append(gain / len(at) if average else gain)
        gains.append(torch.stack(rows))
    return gains


FORMULAS = {
    ("sigmoid", 0.0): lambda d: -torch.log(1 / (1 + torch.exp(-BETA * d))),
    ("sigmoid", 0.1): lambda d: (
        -0.9 * torch.log(1 / (1 + torch.exp(-BETA * d))) - 0.1 * torch.log(1 / (1 + torch.exp(BETA * d)))
    ),
    ("hinge", 0.0): lambda d: torch.clamp(1 - BETA * d, min=0),
    ("ipo", 0.0): lambda d: (d - 1 / (2 * BETA)) ** 2,
}


@pytest.mark.parametrize("average", [None, False, True])
@pytest.mark.parametrize(("loss_type", "smoothing"), FORMULAS)
def test_losses_and_gradients_are_those_of_the_papers(loss_type, smoothing, average, monkeypatch):
    monkeypatch.setattr(hidden, "CHUNK_BYTES", 4 * VOCABULARY * 5)  # five of 48 rows at a time
    objective = DirectPreference(BETA, loss_type, smoothing, average)
    batch = objective.prepare(pairs(), {"reference": Table(1)})
    # A policy with states: its logits follow from the token, too.
    states, weight = (torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(s)) for s in (2, 3))
    states.requires_grad_()
    weight.requires_grad_()
    averages = loss_type == "ipo" if average is None else average
    chosen, rejected = by_hand(states @ weight.T, Table(1).logits, batch, averages)
    want = FORMULAS[loss_type, smoothing](chosen - rejected).mean()
    expected = torch.autograd.grad(want, (states, weight))
    ids = objective.model_inputs(batch)["input_ids"]
    for output in (states[ids] @ weight.T, Hidden(states[ids], weight)):
        loss, metrics = objective.loss(output, batch)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for got, one in zip(torch.autograd.grad(loss, (states, weight)), expected, strict=True):
            torch.testing.assert_close(got, one, rtol=1e-5, atol=1e-5)
        sums = [BETA * each.detach() for each in by_hand(states @ weight.T, Table(1).logits, batch, False)]
        assert set(metrics) == set(objective.metrics)
        assert math.isclose(metrics["reward_chosen"], sums[0].mean(), rel_tol=1e-4)
        assert math.isclose(metrics["reward_margin"], (sums[0] - sums[1]).mean(), rel_tol=1e-4)
        assert math.isclose(metrics["reward_accuracy"], (sums[0] > sums[1]).float().mean(), rel_tol=1e-6)
    assert objective.weight(batch) == 3


def test_rows_that_fill_up_a_batch_are_no_pairs():
    objective = DirectPreference(BETA)
    batch = objective.prepare(pairs(), {"reference": Table(1)})
    filled = {name: torch.cat([values, values[:2]]) for name, values in batch.items()}
    for name in ("labels", "rejected_labels"):
        filled[name][3:] = -100
    of, of_filled = (objective.loss(Table(2).logits[in_one(each)["input_ids"]], each) for each in (batch, filled))
    torch.testing.assert_close(of_filled, of)
    assert objective.weight(filled) == objective.weight(batch) == 3


def test_a_model_that_is_its_own_reference_has_the_loss_of_a_coin():
    objective = DirectPreference(BETA)
    batch = objective.prepare(pairs(), {"reference": Table(1)})
    loss, metrics = objective.loss(Table(1).logits[objective.model_inputs(batch)["input_ids"]], batch)
    assert math.isclose(loss, math.log(2), rel_tol=1e-6)
    assert abs(metrics["reward_margin"]) < 1e-6


def test_rows_of_both_answers_are_as_wide_and_masked_where_one_is():
    batch = pairs()
    both = in_one(batch)
    assert {name: tuple(values.shape) for name, values in both.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (6, 8)
    )
    assert torch.equal(both["labels"][3:], batch["rejected_labels"])
    assert both["labels"][:3, 6:].eq(-100).all()
    assert not both["attention_mask"][:3, 6:].any()
    del batch["attention_mask"]  # of which GlobalBatches leaves out one of nothing but ones
    assert in_one(batch)["attention_mask"][:3].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]] * 3
    del batch["rejected_attention_mask"]
    assert "attention_mask" not in in_one(batch)


def test_rows_without_a_second_answer_are_refused():
    with pytest.raises(ValueError, match="these have input_ids, labels"):
        DirectPreference().weight({"input_ids": torch.zeros(1, 2), "labels": torch.zeros(1, 2)})


@pytest.mark.parametrize(
    ("name", "args", "key", "text"),
    [
        ("dpo", {"beta": 0}, "objective.args.beta", "greater than 0"),
        ("dpo", {"beta": "much"}, "objective.args.beta", "must be a number"),
        ("dpo", {"loss_type": "kto"}, "objective.args.loss_type", "knows sigmoid, ipo, hinge; not 'kto'"),
        ("dpo", {"label_smoothing": 0.5}, "objective.args.label_smoothing", r"in \[0, 0.5\)"),
        (
            "dpo",
            {"loss_type": "ipo", "label_smoothing": 0.1},
            "objective.args.label_smoothing",
            "for loss_type sigmoid",
        ),
        ("dpo", {"average_log_prob": "yes"}, "objective.args.average_log_prob", "true or false"),
        ("dpo", {"gamma": 1}, "objective.args", "dpo: got an unexpected keyword argument 'gamma'"),
        ("sft", {"z_loss": -1}, "objective.args.z_loss", "0 or more, not -1"),
        ("sft", {"label_smoothing": 1}, "objective.args.label_smoothing", r"in \[0, 1\)"),
        ("language_modeling", {"z_loss": True}, "objective.args.z_loss", "not True"),
        ("distillation", {}, "objective.args", "missing a required argument: 'teacher'"),
        ("distillation", {"teacher": 3}, "objective.args.teacher", "a directory or a hub name"),
        ("distillation", {"teacher": "x", "temperature": 0}, "objective.args.temperature", "greater than 0"),
        ("distillation", {"teacher": "x", "share": 1.5}, "objective.args.share", "from 0 to 1"),
    ],
)
def test_what_an_objective_does_not_take_is_said(name, args, key, text):
    with pytest.raises(ConfigError, match=text) as caught:
        build_objective(ObjectiveConfig(name, args))
    assert caught.value.key == key
