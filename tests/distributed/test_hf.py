"""Hugging Face weights in and out: what transformers wrote is trained, what was trained is read by transformers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from areal_ray import models
from areal_ray.checkpoint import CheckpointDamaged, save
from areal_ray.cli.main import main as run_cli
from areal_ray.config import ModelConfig
from areal_ray.data import build_tokenizer
from areal_ray.distributed import Ranks
from areal_ray.engine import FSDPEngine, SaveLoadMeta
from areal_ray.engine.state import DCPState
from areal_ray.models import hf_weights, safetensors_files
from areal_ray.storage import LocalStorage
from areal_ray.tools.export import export
from tests.distributed.ranks import run_ranks
from tests.distributed.small import FINE, VOCABULARY, attempt, global_batch, small_config, train

pytestmark = pytest.mark.distributed

SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mixtral": {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
}
KINDS = {
    "tied": ("qwen3", True, torch.float32),
    "untied, in bfloat16": ("qwen3", False, torch.bfloat16),
    "without a prefix": ("gpt2", True, torch.float32),
    "experts one by one": ("mixtral", True, torch.float32),
}


def write_model(path: Path, kind: str) -> None:
    """A model with random weights, in several files, as transformers writes it."""
    model_type, tied, dtype = KINDS[kind]
    sizes = SIZES[model_type] | {"vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes), dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # norms and biases too: every weight counts
    # gpt2 on the hub is the bare model, whose names lack the prefix of the one with a head.
    (model.transformer if kind == "without a prefix" else model).save_pretrained(path, max_shard_size="100KB")


def start(*overrides: str) -> FSDPEngine:
    # The experiment's own model.config gives way to the group without one.
    config = small_config("model=pretrained", *overrides, sizes=False)
    engine = FSDPEngine(config)
    engine.initialize()
    return engine


def logits_of(path: Path | str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What transformers computes from a directory."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(**batch).logits
    return logits


@dataclass
class Seen:
    """What a rank saw: same logits at first and after an export, and the elements it read."""

    loaded: bool
    exported: bool
    changed: bool
    elements: int


def load_train_export(rank: int, root: str) -> dict[str, Seen]:
    torch.set_num_threads(1)
    batch, elements = global_batch(0), []
    read = safetensors_files.read_part

    def counting(file: Any, key: str, box: Any) -> torch.Tensor:
        elements.append(math.prod(end - begin for begin, end in box))
        return read(file, key, box)

    safetensors_files.read_part = counting
    seen = {}
    for kind in KINDS:
        path = Path(root) / kind
        elements.clear()
        engine = start(f"model.path={path / 'given'}")
        want, got = engine_rows(engine, path / "given", batch)
        train(engine, seed=0)
        info = {"hf_config": models.architecture(engine._config.model), "tokenizer": "bytes"}
        save(LocalStorage(path / "saved"), {"engine": engine.state}, info, Ranks())
        Ranks().on_rank_zero(
            lambda path=path: export(LocalStorage(path / "saved"), LocalStorage(path / "out"), shard_bytes=60_000)
        )
        after, now = engine_rows(engine, path / "out", batch)
        seen[kind] = Seen(torch.equal(want, got), torch.equal(after, now), not torch.equal(got, now), sum(elements))
    return seen


def engine_rows(engine: FSDPEngine, path: Path, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the first three rows, from transformers and from the engine."""
    rows = {name: tensor[:3] for name, tensor in batch.items()}
    return logits_of(path, rows), engine.forward(rows)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    for kind in KINDS:
        write_model(root / kind / "given", kind)
    return root


@pytest.fixture(scope="module")
def seen(root: Path) -> list[dict[str, Seen]]:
    return run_ranks(load_train_export, 2, str(root))


@pytest.mark.parametrize("kind", KINDS)
def test_training_begins_with_the_weights_of_the_directory(seen: list[dict[str, Seen]], kind: str) -> None:
    assert [rank[kind].loaded for rank in seen] == [True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_gives_the_same_logits_bit_for_bit(seen: list[dict[str, Seen]], kind: str) -> None:
    assert [rank[kind].exported for rank in seen] == [True, True]
    assert [rank[kind].changed for rank in seen] == [True, True]  # by the step in between


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_reads_its_part_only(seen: list[dict[str, Seen]], root: Path, kind: str) -> None:
    whole = sum(tensor.numel() for tensor in safetensors_files.opened(str(root / kind / "given")).values())
    assert sum(rank[kind].elements for rank in seen) == whole
    assert all(rank[kind].elements < 0.6 * whole for rank in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_cut_into_files_with_an_index(seen: list[dict[str, Seen]], root: Path, kind: str) -> None:
    out = root / kind / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    where, size = {}, 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file.name)
            parts = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118  (not a dict)
        bytes_here = sum(part.numel() * part.itemsize for part in parts)
        assert bytes_here <= 60_000 or len(parts) == 1
        size += bytes_here
    assert index == {"metadata": {"total_size": size}, "weight_map": where}
    assert ("lm_head.weight" in where) == (kind == "untied, in bfloat16")


def test_an_export_has_the_tokenizer(seen: list[dict[str, Seen]], root: Path) -> None:
    text = "def f(x):\n\treturn 'ü – 字' \x00  # \r\n"
    exported = AutoTokenizer.from_pretrained(root / "tied" / "out")
    ids = build_tokenizer("bytes").encode(text.encode())
    assert [*exported(text)["input_ids"], exported.eos_token_id] == ids.tolist()
    assert exported.decode(exported(text)["input_ids"]) == text


def test_what_was_exported_can_be_trained_on(seen: list[dict[str, Seen]], root: Path) -> None:
    (again,) = run_ranks(same_weights, 1, str(root / "tied" / "out"))
    assert again == []


def same_weights(rank: int, path: str) -> list[str]:
    engine = start(f"model.path={path}")
    stored = {name: tensor for file in Path(path).glob("*.safetensors") for name, tensor in load_file(file).items()}
    live = hf_weights.weights_of(engine.model)
    return sorted(set(stored) ^ set(live)) + [
        name
        for name, tensor in live.items()
        if not torch.equal(tensor.full_tensor(), stored[name])  # type: ignore[attr-defined]
    ]


def warm_starts(rank: int, root: str) -> dict[str, tuple[list[str], int]]:
    """By what it begins with: weights that differ from those that were read, bytes that this rank has read."""
    files = Path(root, "given").glob("*.safetensors")
    wanted = {name: tensor for file in files for name, tensor in load_file(file).items()}
    engine = start(f"model.path={root}/given")
    dcp.save({"app": engine.state.state_dict()["model"]}, checkpoint_id=f"{root}/dcp")
    engine.save(SaveLoadMeta(f"{root}/own"))
    spent: list[int] = []
    read = LocalStorage.read_range

    def counting(self: LocalStorage, name: str, offset: int, length: int) -> bytes:
        spent.append(length)
        return read(self, name, offset, length)

    LocalStorage.read_range = counting  # type: ignore[method-assign]
    seen = {}
    sizes = {"model_type": "qwen3", **SIZES["qwen3"], "vocab_size": VOCABULARY, "tie_word_embeddings": True}
    for kind, names in (("dcp", [r"{pattern: '^app\.'}"]), ("own", [])):
        spent.clear()
        config = f"model.config={json.dumps(sizes)}"
        engine = start(f"model.path={root}/{kind}", config, f"model.names=[{', '.join(names)}]")
        live = {name: whole(tensor) for name, tensor in hf_weights.weights_of(engine.model).items()}
        seen[kind] = [name for name in live if not torch.equal(live[name], wanted[name])], sum(spent)
    return seen


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor()  # type: ignore[no-any-return]


def test_each_rank_reads_its_parts_of_what_others_saved(tmp_path: Path) -> None:
    write_model(tmp_path / "given", "tied")
    total = sum(file.stat().st_size for file in (tmp_path / "given").glob("*.safetensors"))
    for seen in run_ranks(warm_starts, 2, str(tmp_path)):
        assert {kind: differing for kind, (differing, _) in seen.items()} == {"dcp": [], "own": []}
        assert 0.5 * total < seen["dcp"][1] < 0.75 * total


def refused(rank: int, root: str) -> list[Any]:
    paths = [Path(root) / name for name in ("short", "long", "narrow")]
    return [attempt(lambda path=path: start(f"model.path={path}")) for path in paths]


def test_weights_that_do_not_fit_are_refused_by_name(root: Path, tmp_path: Path) -> None:
    for name in ("short", "long", "narrow"):
        write_model(tmp_path / name, "tied")
        (tmp_path / name / "model.safetensors.index.json").unlink()
    norm = "model.norm.weight"
    for name in ("short", "long", "narrow"):
        (file,) = [file for file in (tmp_path / name).glob("*.safetensors") if norm in load_file(file)]
        weights = load_file(file)
        if name == "short":
            del weights[norm]
        elif name == "long":
            weights["model.extra.weight"] = torch.zeros(3)
        else:
            weights[norm] = weights[norm][:-1].contiguous()
        save_file(weights, file, metadata={"format": "pt"})
    for short, long, narrow in run_ranks(refused, 2, str(tmp_path)):
        assert FINE not in (short, long, narrow)
        assert f"{norm} is missing" in short.text
        assert "model.extra.weight is unknown here" in long.text
        assert f"{norm} is (63,) in it and (64,) here" in narrow.text


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no safetensors"):
        hf_weights.resolve(str(tmp_path))


def test_an_export_writes_into_an_empty_directory_only(seen: list[dict[str, Seen]], root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("here")
    with pytest.raises(FileExistsError, match="not empty"):
        export(LocalStorage(root / "tied" / "saved"), LocalStorage(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_damaged_checkpoint_is_not_exported(seen: list[dict[str, Seen]], root: Path, tmp_path: Path) -> None:
    saved = root / "without a prefix" / "saved"
    shard = saved / "shard-00001.distcp"
    data = bytearray(shard.read_bytes())
    data[::997] = bytes(byte ^ 4 for byte in data[::997])  # wherever the weights are among the optimizer's moments
    shard.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match="shard-00001"):
        export(LocalStorage(saved), LocalStorage(tmp_path / "out"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_model_that_transformers_does_not_know_is_not_exported(tmp_path: Path, capsys: Any) -> None:
    state = {"engine": DCPState(torch.nn.Linear(2, 2))}
    save(LocalStorage(tmp_path / "saved"), state, {"hf_config": None}, Ranks())
    assert run_cli(["ckpt", "export", str(tmp_path / "saved"), str(tmp_path / "out")]) == 1
    assert "which transformers model" in capsys.readouterr().err


def test_the_config_of_a_directory_is_compared_as_its_library_reads_it(root: Path) -> None:
    model = ModelConfig(path=str(root / "tied" / "given"))
    saved = models.architecture(model)
    assert saved is not None
    assert saved["architectures"] == ["Qwen3ForCausalLM"]
    assert models.same_architecture(saved, model)
    assert not models.same_architecture({**saved, "rms_norm_eps": 1e-3}, model)
