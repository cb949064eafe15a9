"""The `hf` format of the engine: transformers reads it, and what goes wrong is heard by every rank."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from areal_ray.engine import FSDPEngine, SaveLoadMeta
from tests.distributed.ranks import run_ranks
from tests.distributed.small import (
    attempt,
    differing,
    disk_full,
    erase,
    global_batch,
    local_batch,
    same_bits,
    snapshot,
    start_engine,
    train,
)

pytestmark = pytest.mark.distributed

UNTIED = "model.config.tie_word_embeddings=false"


def hf_directory(rank: int, root: str) -> list[dict[str, Any]]:
    """Logits of the engine and of what transformers makes of its `hf` directory, tied and untied, one rank."""
    outcomes = []
    for name, overrides in {"tied": [], "untied": [UNTIED]}.items():
        engine = start_engine("train.micro_batch_size=8", *overrides)
        train(engine, seed=0)
        engine.save(SaveLoadMeta(f"{root}/{name}", "hf", with_optim=False))
        model = AutoModelForCausalLM.from_pretrained(f"{root}/{name}").eval()
        with torch.no_grad():
            theirs = model(**global_batch(1)).logits
        ours = engine.forward(local_batch(1))
        dtypes = {p.dtype for p in model.parameters()}
        outcomes.append({"ours": ours, "theirs": theirs, "dtypes": dtypes, "tied": _is_tied(model)})
    return outcomes


def _is_tied(model: Any) -> bool:
    return bool(model.lm_head.weight is model.model.embed_tokens.weight)


def test_transformers_opens_the_hf_directory_and_computes_the_same(tmp_path: Path) -> None:
    (outcomes,) = run_ranks(hf_directory, 1, str(tmp_path))
    for outcome in outcomes:
        assert outcome["dtypes"] == {torch.float32}
        assert same_bits(outcome["ours"], outcome["theirs"])
    assert [outcome["tied"] for outcome in outcomes] == [True, False]


def fail_with_hf(rank: int, root: str) -> dict[str, Any]:
    """The same for the `hf` format, which is written in place."""
    engine = start_engine()
    seen: dict[str, Any] = {"lost to leftovers": _save_over_leftovers(rank, engine, Path(root, "leftovers"))}
    engine.save(SaveLoadMeta(f"{root}/fine", "hf", with_optim=False))
    seen["on return"] = sorted(path.name for path in Path(root, "fine").iterdir())
    for victim in (0, 1):
        meta = SaveLoadMeta(f"{root}/full-{victim}", "hf", with_optim=False)
        with disk_full(rank == victim):
            seen[f"full on {victim}"] = attempt(lambda meta=meta: engine.save(meta))
    if rank == 0:
        Path(root, "no config", "config.json").mkdir(parents=True)
        written = next(Path(root, "fine").glob("*.safetensors"))
        Path(root, "cut").mkdir()
        Path(root, "cut", written.name).write_bytes(written.read_bytes()[:-1000])
    dist.barrier()
    seen["no config"] = attempt(lambda: engine.save(SaveLoadMeta(f"{root}/no config", "hf", with_optim=False)))
    seen["cut"] = attempt(lambda: engine.load(SaveLoadMeta(f"{root}/cut", "hf", with_optim=False)))
    fine = SaveLoadMeta(f"{root}/fine", "hf", with_optim=False)
    seen["absent"] = attempt(lambda: engine.load(SaveLoadMeta(f"{root}/absent", "hf", with_optim=False)))
    seen["too little"] = attempt(lambda: start_engine(UNTIED).load(fine))
    seen["other model"] = attempt(lambda: start_engine("model.config.hidden_size=32").load(fine))
    return seen


def _save_over_leftovers(rank: int, engine: FSDPEngine, root: Path) -> list[str]:
    """Save where an interrupted save of more ranks left a part; names that do not come back."""
    if rank == 0:
        (root / "sharded").mkdir(parents=True)
        # As DCP's own writer makes them: of the third rank, the second half of a tensor, with other values.
        part = root / "sharded" / "shard-00003-model-00001-of-00001.safetensors"
        offsets = json.dumps({"model.norm.weight": {"saved_offsets": [32]}})
        values = {"model.norm.weight": torch.full((32,), 99.0)}
        safetensors.torch.save_file(values, part, metadata={"DCP_SHARDING_INFO": offsets})
    dist.barrier()
    # DCP takes files in the order of the directory, which can be any; from here on what was left over comes last.
    unordered = glob.glob
    glob.glob = lambda *args, **kwargs: sorted(unordered(*args, **kwargs))
    saved = snapshot(engine)
    engine.save(SaveLoadMeta(str(root), "hf", with_optim=False))
    erase(engine)
    engine.load(SaveLoadMeta(str(root), "hf", with_optim=False))
    return differing(snapshot(engine), saved, only="model.")


@pytest.fixture(scope="module")
def failed_hf(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(fail_with_hf, 2, str(tmp_path_factory.mktemp("failed hf")))


@pytest.mark.parametrize("victim", [0, 1])
def test_hf_a_rank_that_cannot_write_is_heard_by_all(failed_hf: list[dict[str, Any]], victim: int) -> None:
    for seen in failed_hf:
        assert seen[f"full on {victim}"].error == "RankError"
        assert "File too large" in seen[f"full on {victim}"].text


def test_hf_a_config_that_cannot_be_written_is_heard_by_all(failed_hf: list[dict[str, Any]]) -> None:
    for seen in failed_hf:
        assert seen["no config"].error == "RankError"
        assert "config.json" in seen["no config"].text


def test_hf_the_directory_is_complete_when_save_returns_on_any_rank(failed_hf: list[dict[str, Any]]) -> None:
    for seen in failed_hf:
        assert "config.json" in seen["on return"]
        assert "sharded" not in seen["on return"]


def test_hf_what_an_interrupted_save_left_does_not_get_into_the_next(failed_hf: list[dict[str, Any]]) -> None:
    assert [seen["lost to leftovers"] for seen in failed_hf] == [[], []]


@pytest.mark.parametrize("what", ["cut", "absent"])
def test_hf_damage_is_heard_by_all(failed_hf: list[dict[str, Any]], what: str) -> None:
    for seen in failed_hf:
        assert seen[what].error == "RankError"


def test_hf_weights_that_do_not_fit_are_refused_by_all(failed_hf: list[dict[str, Any]]) -> None:
    for seen in failed_hf:
        for what, name in (("too little", "lm_head.weight"), ("other model", "model.embed_tokens.weight")):
            assert seen[what].error == "ValueError"
            assert name in seen[what].text
