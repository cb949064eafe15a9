"""Objectives beside language modelling on two ranks: what they predict, that they resume, and what they leave alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from areal_ray.data import IGNORED, GlobalBatches
from areal_ray.data.corpus.corpus import Corpus
from areal_ray.data.splits import open_splits
from areal_ray.engine.objectives import DirectPreference, text_inputs, token_log_probs
from areal_ray.engine.objectives.dpo import REFERENCE_LOG_PROBS, in_one
from areal_ray.storage import LocalStorage
from areal_ray.tools.verify_resume import BOUND
from tests.distributed.objective_runs import (
    FIRST,
    KINDS,
    LAST,
    SECOND,
    SEQ_LEN,
    asked,
    asked_again,
    back,
    config_of,
    one,
    two,
    with_adapter,
    write,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.small import GLOBAL_BATCH

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("objectives")
    write(root)
    return root


@pytest.fixture(scope="module")
def seen(root: Path) -> dict[str, Any]:
    return run_ranks(two, 2, str(root))[0]


@pytest.fixture(scope="module")
def alone(root: Path, seen: dict[str, Any]) -> dict[str, Any]:
    return run_ranks(one, 1, str(root))[0]


@pytest.fixture(scope="module")
def came_back(root: Path, alone: dict[str, Any]) -> dict[str, Any]:
    return run_ranks(back, 2, str(root))[0]


def rows_of(root: Path, kind: str) -> Any:
    corpus = Corpus(LocalStorage((root / f"{kind}.corpus").read_text()))
    return open_splits(config_of(root, kind).data, {"": corpus}, SEQ_LEN)[0]


def test_of_a_pair_of_docstring_and_body_the_body_alone_is_predicted(root: Path) -> None:
    rows = rows_of(root, "sft")
    labels = rows[np.arange(len(rows))]["labels"]
    said = [bytes(token for token in row if 0 <= token < 256).decode() for row in labels]
    assert said == [json.loads(line)["completion"] for line in (root / "answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_at_two_steps_it_ends_in_the_same_bits(seen: dict[str, Any], kind: str) -> None:
    run = seen[kind]
    assert run["moved"] > 5
    assert run["differing"] == []
    assert run["resumed steps"] == run["steps"][FIRST:]
    assert run["first batch"]["loss"] < run["steps"][0]["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_moved_to_one_rank_and_back_it_ends_within_the_bound(
    seen: dict[str, Any], alone: dict[str, Any], came_back: dict[str, Any], kind: str
) -> None:
    for got, want in zip(alone[kind]["steps"], seen[kind]["steps"][FIRST:SECOND], strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
    for name, want in seen[kind]["tensors"].items():
        assert (came_back[kind][name] - want).norm() <= BOUND * want.norm(), name


@pytest.mark.parametrize(("kind", "how"), [*((kind, "logits") for kind in KINDS), ("dpo", "split")])
def test_without_logits_with_them_and_with_split_layers_it_is_the_same(
    seen: dict[str, Any], kind: str, how: str
) -> None:
    want, got = seen[kind]["chunked"], seen[kind][how]
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_a_frozen_model_stays_what_it_was_is_named_and_not_saved(seen: dict[str, Any], alone: dict[str, Any]) -> None:
    names = {"sft": None, "dpo": "reference", "distillation": "teacher"}
    for kind, name in names.items():
        before, after = seen[kind]["frozen"]
        assert before == after
        said = {name: before[0]} if name else None
        # On two ranks, resumed, over a tensor group and on one rank it has the same fingerprint.
        assert [*seen[kind]["references"], alone[kind]["references"]] == [said] * (4 if kind == "dpo" else 3)
        assert seen[kind]["saved"] == seen["sft"]["saved"]
    assert seen["dpo"]["frozen"] != seen["distillation"]["frozen"]


def test_a_model_may_be_asked_as_a_frozen_one_while_it_is_trained(seen: dict[str, Any]) -> None:
    assert seen["own"] == []


def test_what_was_tuned_is_exported_and_read_with_the_same_logits(seen: dict[str, Any], root: Path) -> None:
    rows, logits = seen["exported"]
    model = AutoModelForCausalLM.from_pretrained(root / "exported", attn_implementation="sdpa").eval()
    with torch.no_grad():
        assert torch.equal(model(**rows).logits, logits)


def test_rewards_part_and_a_teacher_is_come_near_to(seen: dict[str, Any]) -> None:
    first, last = seen["dpo"]["steps"][0], seen["dpo"]["first batch"]
    assert first["reward_margin"] == pytest.approx(0, abs=1e-4)  # the reference is what the model began with
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert last["reward_margin"] > 0.1
    first, last = seen["distillation"]["steps"][0], seen["distillation"]["first batch"]
    assert last["divergence"] < first["divergence"]
    assert all(step["loss"] > step["nll"] > 0 for step in seen["sft"]["steps"])


def test_a_reference_is_asked_once_whatever_the_ranks_and_goes_on_where_it_was(root: Path, tmp_path: Path) -> None:
    alone, two = (run_ranks(asked, size, str(root), str(tmp_path / f"{size}"))[0] for size in (1, 2))
    again = run_ranks(asked_again, 2, str(root), str(tmp_path / "2"))[0]
    rows = len(rows_of(root, "dpo"))
    for seen in (alone, two, again):
        assert seen["rows"] == rows
        assert seen["unknown"]
        assert seen["files"] == [f"{split}.reference_log_probs.bin" for split in ("held_out", "set-other", "train")]
        assert torch.equal(seen["values"], two["values"])
        assert len(set(seen["fingerprints"])) == 1
        for got, want in zip(seen["steps"], two["plain"], strict=True):
            assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert [seen["nothing yet"] for seen in (alone, two, again)] == [True, True, True]
    pieces = -(-rows // 4)
    assert pieces > 2
    # Of three rows and one in a piece, each by another rank; again about two pieces of what is trained on.
    assert (two["calls"], again["calls"]) == (3 * pieces, 2)


def test_beneath_an_adapter_the_base_itself_is_the_reference(root: Path) -> None:
    pytest.importorskip("peft")
    seen = run_ranks(with_adapter, 2, str(root))[0]
    for said in seen["said"][1:]:
        assert torch.equal(said, seen["said"][0])
    assert seen["differing"] == []
    assert seen["steps"][0] == seen["steps"][1]
    assert seen["references"][0] == seen["references"][1] != {}


# Their names in TRL, and what they are here.
LOSSES = {
    "sigmoid": DirectPreference(0.5),
    "hinge": DirectPreference(0.5, "hinge"),
    "ipo": DirectPreference(0.5, "ipo"),
    "sigmoid_norm": DirectPreference(0.5, average_log_prob=True),
}


def test_loss_and_gradients_of_preference_pairs_are_those_of_trl(
    seen: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    """Of a model that has moved from its reference; sigmoid's on two ranks and without logits, in its global batch."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(root / "given", pad_token="<|endoftext|>")
    model, reference = (AutoModelForCausalLM.from_pretrained(root / "given") for _ in range(2))
    moved = {name.removeprefix("model."): tensor for name, tensor in seen["dpo"]["tensors"].items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(moved[name])
    how = {"report_to": "none", "use_cpu": True, "bf16": False, "activation_checkpointing": False}
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(output_dir=str(tmp_path), beta=0.5, **how),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )
    batches = GlobalBatches(rows_of(root, "dpo"), 0, GLOBAL_BATCH, 0, 1)
    batches.next_sample = LAST * GLOBAL_BATCH
    batch = next(batches)
    both = in_one(batch)
    answers = torch.zeros_like(both["labels"])
    answers[:, 1:] = both["labels"][:, :-1] != IGNORED
    inputs = {name: both[name] for name in ("input_ids", "attention_mask")} | {"completion_mask": answers}
    with torch.no_grad():
        said = token_log_probs(reference(**text_inputs(both)).logits, both["labels"]).sum(1)
    batch[REFERENCE_LOG_PROBS] = torch.stack(said.chunk(2), 1)
    for name, objective in LOSSES.items():
        trainer.loss_types = [name]
        want = gradients(model, trainer.compute_loss(model, inputs))
        mine = gradients(model, objective.loss(model(**text_inputs(both)).logits, batch)[0])
        assert max(float(each.abs().max()) for each in want.values()) > 1e-2
        for got in (mine, seen["dpo"]["after"]) if name == "sigmoid" else (mine,):
            for parameter, each in want.items():
                torch.testing.assert_close(got[parameter], each, rtol=1e-5, atol=1e-5, msg=f"{name}: {parameter}")


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        "loss": loss.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }
