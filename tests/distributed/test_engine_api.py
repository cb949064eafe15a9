"""The engine as those use it who know AReaL's: its small methods, and what a save takes and a load accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from areal_ray.engine import FSDPEngine, SaveLoadMeta
from areal_ray.engine.objectives import LanguageModeling, next_token_loss, predicted_tokens
from tests.distributed.ranks import run_ranks
from tests.distributed.small import attempt, differing, erase, local_batch, small_config, snapshot, start_engine, train

pytestmark = pytest.mark.distributed


class Tokenizer:
    """What `SaveLoadMeta` asks of one."""

    def save_pretrained(self, folder: str) -> tuple[str, ...]:
        from areal_ray.data import build_tokenizer

        build_tokenizer("bytes").save(folder)
        return ("tokenizer.json",)


def use(rank: int, root: str) -> dict[str, Any]:
    engine = start_engine()
    train(engine, seed=0)
    seen: dict[str, Any] = {}
    trained = snapshot(engine)
    if rank == 0:
        Path(root, "empty").mkdir()
        Path(root, "full").mkdir()
        Path(root, "full", "something").touch()
    dist.barrier()
    engine.save(SaveLoadMeta(f"{root}/empty", tokenizer=Tokenizer()))
    engine.save(SaveLoadMeta(f"{root}/new/deep/down"))
    engine.save(SaveLoadMeta(f"{root}/new/hf", "hf", with_optim=False, tokenizer=Tokenizer()))
    seen["full"] = attempt(lambda: engine.save(SaveLoadMeta(f"{root}/full")))
    erase(engine)
    engine.load(SaveLoadMeta(f"{root}/empty", with_optim=False))
    seen["weights of a full one"] = differing(snapshot(engine), trained, "model.")
    seen["optimizer"] = differing(snapshot(engine), trained, "optim.") != []
    engine.load(SaveLoadMeta(f"{root}/new/deep/down"))
    seen["all of it"] = differing(snapshot(engine), trained)
    engine.eval()
    seen["modes"] = [engine.model.training]
    engine.train()
    seen["modes"].append(engine.model.training)
    return seen


class Uneven(LanguageModeling):
    """Its metrics are only those of some ranks' micro-batches."""

    metrics = ("of all", "of rank 1")

    def loss(self, output: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
        own = {"of rank 1": 3.0} if dist.get_rank() == 1 else {}
        return next_token_loss(output, batch), {"of all": 2.0, **own}


def compose(rank: int) -> dict[str, Any]:
    """Steps put together from their parts, and with a weight that is a number, beside those of `train_batch`."""
    whole, parts, number = start_engine(), start_engine(), start_engine()
    seen: dict[str, Any] = {}
    for seed in range(3):
        stats = whole.train_batch(local_batch(seed), next_token_loss, predicted_tokens)
        result = parts.forward_backward(local_batch(seed), LanguageModeling())
        seen.setdefault("numbers", []).append((result.numbers(), (float(stats["loss"]), float(stats["grad_norm"]))))
        seen.setdefault("rates", []).append((result.lr, stats["lr"]))
        parts.optimizer_step()
        parts.lr_scheduler_step()
        number.train_batch(local_batch(seed), next_token_loss, lambda batch: float(predicted_tokens(batch)))
    parts.forward_backward(local_batch(7), LanguageModeling())
    seen["twice"] = attempt(lambda: parts.forward_backward(local_batch(8), LanguageModeling())).text
    parts.skip_step()
    seen["uneven"] = parts.forward_backward(local_batch(9), Uneven()).metrics
    parts.skip_step()
    seen["parts"] = differing(snapshot(parts), snapshot(whole))
    seen["number"] = differing(snapshot(number), snapshot(whole))
    return seen


def refer(rank: int) -> dict[str, Any]:
    """A frozen model beside the one that is trained: it stays what both began with."""
    engine = FSDPEngine(small_config())
    engine.initialize(references=["first"])
    before = torch.cat([engine.forward(local_batch(5)).flatten()])
    train(engine, seed=0)
    after = engine.forward(local_batch(5)).flatten()
    frozen = [engine._references["first"](micro) for micro in engine._split(local_batch(5))]
    seen = {"stays": torch.equal(torch.cat(frozen).flatten(), before), "moves": not torch.equal(after, before)}
    engine.destroy()
    return {**seen, "destroyed": not dist.is_initialized()}


def freeze(rank: int) -> dict[str, Any]:
    """Two steps with layer 0 frozen and the norms at twice the rate."""
    groups = "[{pattern: 'layers.0.', freeze: true}, {pattern: norm, lr_scale: 2.0}]"
    engine, plain = start_engine(f"optim.groups={groups}"), start_engine()
    before = snapshot(engine)
    for seed in range(2):
        train(engine, seed)
        train(plain, seed)
    after = snapshot(engine)
    return {
        "changed": differing(after, before, "model."),
        "optimizer": sorted({name.split(".exp")[0].split(".step")[0] for name in after if name.startswith("optim.")}),
        "rates": sorted({group["lr"] for group in engine.optimizer.param_groups}),
        "plain rates": sorted({group["lr"] for group in plain.optimizer.param_groups}),
        "weights": {name: tensor for name, tensor in after.items() if name.startswith("model.")},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def used(root: Path) -> list[dict[str, Any]]:
    return run_ranks(use, 2, str(root))


def test_an_empty_directory_and_new_parents_are_taken_and_a_full_one_is_not(used: list[dict[str, Any]]) -> None:
    for seen in used:
        assert seen["all of it"] == []
        assert seen["full"].error == "RankError"
        assert "FileExistsError" in seen["full"].text


def test_a_load_without_optimizer_takes_the_weights_of_a_full_checkpoint(used: list[dict[str, Any]]) -> None:
    for seen in used:
        assert seen["weights of a full one"] == []
        assert seen["optimizer"]


@pytest.mark.parametrize("where", ["empty", "new/hf"])
def test_a_tokenizer_is_written_beside_the_weights(root: Path, used: list[dict[str, Any]], where: str) -> None:
    assert AutoTokenizer.from_pretrained(root / where)("ab")["input_ids"] == [97, 98]


def test_modes_are_those_of_the_model(used: list[dict[str, Any]]) -> None:
    assert [seen["modes"] for seen in used] == [[False, True]] * 2


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_format must be dcp or hf, not 'safetensors'"):
        SaveLoadMeta("here", "safetensors")


def test_a_step_is_the_sum_of_its_parts_and_a_weight_may_be_a_number() -> None:
    for seen in run_ranks(compose, 2):
        assert all(composed == whole for composed, whole in seen["numbers"] + seen["rates"])
        assert (seen["parts"], seen["number"]) == ([], [])
        assert "optimizer_step or skip_step comes first" in seen["twice"]
        assert seen["uneven"] == {"of all": 2.0, "of rank 1": 3.0}


def test_a_frozen_reference_keeps_the_first_weights() -> None:
    (seen,) = run_ranks(refer, 1)
    assert seen == {"stays": True, "moves": True, "destroyed": True}


def test_groups_freeze_and_scale_alike_on_one_rank_and_on_two() -> None:
    (alone,) = run_ranks(freeze, 1)
    both = run_ranks(freeze, 2)
    for seen in (alone, *both):
        assert not any("layers.0." in name for name in seen["changed"])
        assert "model.model.layers.1.mlp.up_proj.weight" in seen["changed"]
        assert not any("layers.0." in name for name in seen["optimizer"])
        (rate,) = seen["plain rates"]
        assert seen["rates"] == [rate, 2 * rate]
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(both[0]["weights"][name], tensor, rtol=1e-4, atol=1e-5)
