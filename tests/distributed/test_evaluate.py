"""Evaluation of a sharded model: with and without logits, and of a checkpoint apart from training."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from areal_ray import models
from areal_ray.checkpoint import Catalog, save
from areal_ray.checkpoint.reader import StoredState
from areal_ray.cli.main import main as run_cli
from areal_ray.config import GenerateConfig
from areal_ray.distributed import Ranks
from areal_ray.driver.evaluate import Asked, _config, evaluate
from areal_ray.engine import FSDPEngine
from areal_ray.engine.next_token import NextToken
from areal_ray.engine.objectives import DirectPreference, LanguageModeling
from areal_ray.storage import LocalStorage
from areal_ray.train.generation import Generation
from tests.distributed.ranks import run_ranks
from tests.distributed.small import ROOT, SEQ_LEN, SMALL, local_batch, small_config, snapshot, start_engine, train

pytestmark = pytest.mark.distributed
PROMPTS = [[5], [9, 80, 81], [7] * 40]
END = 41
GREEDY = GenerateConfig(prompts=["a", "b", "c"], max_new_tokens=12)
DRAWN = replace(GREEDY, temperature=2.0, top_k=30)
METRICS = ("perplexity", "bits_per_byte", "accuracy")


def look(rank: int, root: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    scored = NextToken(LanguageModeling(), METRICS, (torch.arange(264) < 256).int())
    for loss in ("logits", "chunked"):
        engine = start_engine(f"model.loss={loss}")
        train(engine, seed=0)
        before = snapshot(engine)
        state, made = torch.get_rng_state(), {}
        for name, wanted in (("greedy", GREEDY), ("drawn", DRAWN), ("drawn again", DRAWN)):
            written: list[Any] = []
            generation = Generation(
                engine, Ranks(), wanted, PROMPTS, (END,), 257, 3, lambda *each, to=written: to.append(each)
            )
            assert generation.run(5) == {}
            made[name] = written
        seen[f"{loss} made"], seen[f"{loss} drew"] = made, not torch.equal(state, torch.get_rng_state())
        result = engine.evaluate(local_batch(1, engine), scored)
        seen[loss] = {"loss": float(result.loss), **{name: float(value) for name, value in result.metrics.items()}}
        seen[f"{loss} changed"] = [
            name for name, value in snapshot(engine).items() if not torch.equal(value, before[name])
        ]
    config = engine._config
    info = {
        "config": json.loads(json.dumps(asdict(config))),
        "hf_config": models.architecture(config.model),
        "tokenizer": "bytes",
        "loss": "chunked",
        "seed": 0,
    }
    save(LocalStorage(Path(root) / "run" / "saved"), {"engine": engine.state}, info, Ranks())
    engine.destroy()
    seen["apart"] = evaluate(Asked(f"{root}/run/saved", data=[f"{root}/text"]))
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    (root / "run").mkdir()
    (root / "text").mkdir()
    for i in range(3):
        (root / "text" / f"{i}.txt").write_text(f"line {i}, ü\n" * 31)
    return root


@pytest.fixture(scope="module")
def seen(root: Path) -> list[dict[str, Any]]:
    return run_ranks(look, 2, str(root))


def test_the_same_is_found_with_and_without_logits_and_nothing_changes(seen: list[dict[str, Any]]) -> None:
    first, second = seen
    assert first["logits"] == second["logits"]
    assert first["chunked"] == pytest.approx(first["logits"], rel=1e-5)
    assert 0 < first["logits"]["bytes_per_token"] < 1  # there are tokens in it which are no bytes
    assert all(not rank[f"{loss} changed"] for rank in seen for loss in ("logits", "chunked"))


def whole_model(root: Path) -> torch.nn.Module:
    """The model that was saved, not sharded."""
    state = StoredState(LocalStorage(root / "run" / "saved"))
    model = models.build_model(small_config().model)
    models.materialise(model, torch.device("cpu"))
    models.init_buffers(model)
    weights = {name.removeprefix("engine.model."): value for name, value in state.tensors(state.names)}
    missing = model.load_state_dict({k: v for k, v in weights.items() if not k.startswith("engine.")}, strict=False)
    assert not [name for name in missing.missing_keys if name != "lm_head.weight"]
    model.tie_weights()  # type: ignore[operator]
    return model.eval()


def expected(root: Path) -> dict[str, float]:
    """Of every row of the text once, by one model that is not sharded."""
    text = b"".join(path.read_bytes() + b"\xff" for path in sorted((root / "text").iterdir()))
    tokens = np.frombuffer(text, np.uint8).astype(np.int64)
    tokens[tokens == 255] = 256  # ends of documents: no byte of UTF-8 is 255
    rows = torch.from_numpy(tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].reshape(-1, SEQ_LEN))
    with torch.no_grad():
        logits = whole_model(root)(input_ids=rows).logits[:, :-1].flatten(0, 1)
    labels = rows[:, 1:].flatten()
    nats = float(F.cross_entropy(logits, labels, reduction="sum"))
    loss = nats / len(labels)
    return {
        "loss": loss,
        "accuracy": float((logits.argmax(-1) == labels).float().mean()),
        "perplexity": math.exp(loss),
        "bits_per_byte": nats / math.log(2) / int((labels < 256).sum()),
        "rows": len(rows),
    }


def test_a_sharded_model_goes_on_with_prompts_as_a_whole_one(seen: list[dict[str, Any]], root: Path) -> None:
    model, want = whole_model(root), []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(GREEDY.max_new_tokens):
            with torch.no_grad():
                text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1, :257].argmax()))
            if text[-1] == END:
                break
        want.append(text[len(prompt) :])
    for loss in ("logits", "chunked"):
        first, second = (rank[f"{loss} made"] for rank in seen)
        assert first["greedy"] == [(5, want)]
        assert first["drawn"] == first["drawn again"] != first["greedy"]
        assert len({tuple(each) for each in first["drawn"][0][1]}) == 3
        assert all(not written for written in second.values())  # rank 0 writes
        assert not any(rank[f"{loss} drew"] for rank in seen)  # from what training draws from


def test_a_checkpoint_is_evaluated_on_every_row_once_by_any_number_of_ranks(
    seen: list[dict[str, Any]], root: Path, capsys: Any
) -> None:
    want = expected(root)
    assert want["rows"] % 6  # neither a multiple of what two ranks take at once nor of what one does
    assert want["rows"] % 3
    for rank in seen:
        assert rank["apart"]["data"] == pytest.approx(want, rel=1e-5)
    told = ["evaluate", str(root / "run" / "saved"), "--json", "--data", str(root / "text" / "*.txt")]
    assert run_cli([*told, "train.micro_batch_size=2"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == pytest.approx(want, rel=1e-5)
    assert run_cli([*told[:2], "--data", str(root / "text"), "--rows", "4"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["set", "rows", "loss", "accuracy", "perplexity", "bits", "per", "byte"]
    assert out[1].split()[:2] == ["data", "4"]


def test_mistakes_of_an_evaluation_are_one_line(
    seen: list[dict[str, Any]], root: Path, tmp_path: Path, capsys: Any
) -> None:
    def said(status: int, *arguments: str) -> str:
        assert run_cli(["evaluate", *arguments]) == status
        (line,) = capsys.readouterr().err.splitlines()
        return str(line)

    saved = str(root / "run" / "saved")
    assert "does not say where the data of its run lie: give --data" in said(1, saved)
    assert "data.paths: " in said(2, saved, "--data", str(tmp_path / "nowhere.txt"))
    assert "manifest.json: missing" in said(1, str(tmp_path))
    assert "--rows: must be greater than 0" in said(2, saved, "--rows", "0")
    info = {"config": {"data": {"tokenizer": "some/body"}}, "hf_config": {"model_type": "qwen3"}}
    state = {"engine": type("Box", (), {"state_dict": lambda _: {"w": torch.ones(2)}})()}
    save(LocalStorage(tmp_path / "other"), state, info, Ranks())
    assert "not loaded unasked: give --tokenizer some/body" in said(1, str(tmp_path / "other"))
    code = {"config": {"objective": {"name": "mine:Own"}}, "hf_config": {"model_type": "qwen3"}}
    save(LocalStorage(tmp_path / "code"), state, code, Ranks())
    assert "names mine:Own, and code is not run unasked: give --config" in said(1, str(tmp_path / "code"))
    teacher = {"objective": {"name": "distillation", "args": {"teacher": "some/body"}}, "train": {}}
    teacher["train"] = {"micro_batch_size": 1, "seq_len": 8}
    save(LocalStorage(tmp_path / "taught"), state, {"config": teacher, "hf_config": code["hf_config"]}, Ranks())
    said_of_it = said(1, str(tmp_path / "taught"), "--data", str(root / "text"))
    assert "a frozen model (teacher), which is not loaded unasked: give --config" in said_of_it


def saved_run(path: Path, *overrides: str, step: int = 1, references: tuple[str, ...] = ()) -> None:
    """A checkpoint of a run that has not trained yet."""
    engine = FSDPEngine(small_config(*overrides, sizes=not references))
    engine.initialize(references=references)
    config = engine._config
    info = {"config": json.loads(json.dumps(asdict(config))), "hf_config": models.architecture(config.model)}
    info |= {"tokenizer": "bytes", "seed": config.run.seed, "step": step, "attempt": 1, **engine.describe()}
    path.parent.mkdir(exist_ok=True)
    save(LocalStorage(path), {"engine": engine.state}, info, Ranks())
    engine.destroy()


def test_a_frozen_model_is_the_one_that_the_run_had(tmp_path: Path, capsys: Any) -> None:
    began, saved = tmp_path / "began", tmp_path / "run" / "saved"
    saved_run(began / Catalog.name(1, 1))
    sizes = [text for text in SMALL if not text.startswith(("model.", "train.steps", "optim.warmup"))]
    of = [*sizes, "model=pretrained", "objective={name: dpo}", "data.source=jsonl", "data.format=preference"]
    of += ["data.packing=none", "data.paths=[none.jsonl]", f"run.storage_path={tmp_path}"]
    saved_run(saved, *of, "data.tokenizer=bytes", f"model.path={began}", references=DirectPreference.references)
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 3)
    told = ["evaluate", str(saved), "--json", "--data", str(tmp_path / "pairs.jsonl")]
    its_own = ["--config", str(ROOT / "conf/experiments/tiny.yaml"), *of, "train.epochs=1"]

    def found(path: Path) -> dict[str, float]:
        capsys.readouterr()
        assert run_cli([*told, *its_own, f"model.path={path}"]) == 0
        return dict(json.loads(capsys.readouterr().out)["data"])

    values = found(began)  # its length is in epochs, its path that of a run
    assert (values["loss"], values["rows"]) == (pytest.approx(math.log(2), abs=1e-5), 3)  # neither model has moved
    assert run_cli(told) == 1
    assert "a frozen model (reference), which is not loaded unasked: give --config" in capsys.readouterr().err
    saved_run(began / Catalog.name(2, 1), "run.seed=1", step=2)  # it has gone on
    assert run_cli([*told, *its_own, f"model.path={began}"]) == 1
    said = capsys.readouterr().err
    assert f"the frozen model `reference` is not the one of {saved}" in said
    assert f"model.path that its run had ({began / Catalog.name(1, 1)})" in said
    assert found(began / Catalog.name(1, 1))["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_model_is_tied_or_not_as_its_run_found_it() -> None:
    asked = Asked("run/saved", config=str(ROOT / "conf/experiments/tiny.yaml"))
    assert _config(asked, {"config": {"model": {"tie": False}}}, "run/saved").model.tie is False
