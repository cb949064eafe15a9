"""Adapters on two ranks: the base stays and is in no checkpoint, what is saved goes on, exports give its logits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from areal_ray import models
from areal_ray.checkpoint import save
from areal_ray.cli.main import main as run_cli
from areal_ray.config import AdapterConfig, Config, ConfigError
from areal_ray.distributed import Ranks
from areal_ray.driver import preflight
from areal_ray.engine import FSDPEngine, Objective, SaveLoadMeta
from areal_ray.engine.objectives import next_token_loss, predicted_tokens, text_inputs
from areal_ray.storage import LocalStorage
from areal_ray.tools.checkpoints import differences
from tests.distributed.ranks import RankFailed, run_ranks
from tests.distributed.small import (
    VOCABULARY,
    attempt,
    differing,
    global_batch,
    local_batch,
    small_config,
    snapshot,
    train,
)

pytestmark = pytest.mark.distributed
peft = pytest.importorskip("peft", reason="adapters by LoRA need the extra areal_ray[lora]")

LAST = 6
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_size": 128, "intermediate_size": 512, "tie_word_embeddings": True} | ATTENTION,
    "untied": {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False} | ATTENTION,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
}
# The base and the arguments of each export that is tried.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("qwen3", {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "all linear layers": ("untied", {"r": 4, "target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.1}),
    "a whole layer beside": ("untied", {"r": 2, "target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}),
    "transposed weights": ("gpt2", {"r": 2, "target_modules": ["c_attn"]}),
}


def write_base(path: Path, kind: str, seed: int = 1) -> None:
    """A model with random weights as transformers writes it."""
    torch.manual_seed(seed)
    sizes = SIZES[kind] | {"vocab_size": VOCABULARY}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2" if kind == "gpt2" else "qwen3", **sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)


def write_added(path: Path, base: Path) -> None:
    """An adapter of somebody else's on that base, as peft writes it."""
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(path)


@cache
def pretrained(*more: str) -> Config:
    """A config without a model's path: made once, as that takes longer than a step here."""
    return small_config("model=pretrained", "model.path=there", "train.steps=6", "optim.lr=0.02", *more, sizes=False)


def config_of(path: Path | str, adapter: AdapterConfig | None, *more: str) -> Config:
    config = pretrained(*more)
    return replace(config, model=replace(config.model, path=str(path)), adapter=adapter)


def with_added(config: Config, path: str) -> Config:
    return replace(config, model=replace(config.model, merge_adapter=path))


def adapted(root: Path | str, *more: str, kind: str = "attention") -> FSDPEngine:
    base, args = KINDS[kind]
    return FSDPEngine(config_of(Path(root) / base, AdapterConfig("lora", args), *more))


def base_of(engine: FSDPEngine) -> dict[str, torch.Tensor]:
    """The weights of the base, whole, by the names that they have without the adapter."""
    whole, found = snapshot(engine), engine._sharded.adapted
    assert found is not None
    return {there: whole[f"model.{here}"] for here, there in found.base.items()}


def adapter_of(engine: FSDPEngine) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    return {name: tensor for name, tensor in snapshot(engine).items() if ".lora_" in name}


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


class Against(Objective):
    """Next tokens, not far from a reference: asks the reference before each micro-batch."""

    references = ("first",)

    def prepare(self, batch: Any, frozen: Any) -> Any:
        return {**batch, "first": frozen["first"](text_inputs(batch))}

    def model_inputs(self, batch: Any) -> Any:
        return text_inputs(batch)

    def weight(self, batch: Any) -> torch.Tensor:
        return predicted_tokens(batch)

    def loss(self, output: Any, batch: Any) -> Any:
        return next_token_loss(output, batch) + (output - batch["first"]).square().mean(), {}


class Offset(nn.Module):
    """A trained offset of a linear layer's output."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.by, self.on = inner, nn.ParameterDict({"offset": torch.empty(inner.out_features)}), True

    def reset_parameters(self) -> None:
        nn.init.constant_(self.by["offset"], 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.by["offset"] if self.on else self.inner(x)


class Offsets(models.Adapter):
    """An adapter of one's own."""

    def attach(self, model: nn.Module) -> None:
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.mlp.down_proj = Offset(layer.mlp.down_proj)  # type: ignore[union-attr]

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        offsets = [module for module in model.modules() if isinstance(module, Offset)]
        for module in offsets:
            module.on = False
        yield
        for module in offsets:
            module.on = True

    def merged(
        self, model: nn.Module, name: str, weight: torch.Tensor, trained: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        return weight


def undisturbed(rank: int, root: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    engine, base = adapted(root), plain(root)
    engine.initialize()
    seen["said"], first = engine.describe()["adapter"], base_of(engine)
    stored = {n: t for n, t in AutoModelForCausalLM.from_pretrained(Path(root) / "qwen3").state_dict().items()}
    seen["base read"] = [name for name, tensor in first.items() if not torch.equal(tensor, stored[name])]
    seen["first logits"] = torch.equal(engine.forward(local_batch(9)), base.forward(local_batch(9)))
    for step in range(LAST):
        train(engine, step)
        if step in (1, 5):
            engine.save(SaveLoadMeta(f"{root}/whole-{step + 1}"))
    seen["base kept"] = differing(first, base_of(engine))
    seen["tensors"] = sorted({name.split(".")[-3] for name in adapter_of(engine)})
    seen["state"] = [name for name in engine.state.state_dict()["model"] if "lora_" not in name]
    seen["reference"] = references(root, base)
    base.save(SaveLoadMeta(f"{root}/full"))
    seen["hf"] = by_directory(engine, root)
    seen["fingerprints"] = fingerprints(root, engine.describe()["adapter"]["base"]["fingerprint"])
    seen["own"] = of_ones_own(root, base)
    return seen


def plain(root: str) -> FSDPEngine:
    engine = FSDPEngine(config_of(f"{root}/qwen3", None))
    engine.initialize()
    return engine


def references(root: str, base: FSDPEngine) -> dict[str, Any]:
    """Two steps of an objective with a reference: that is the base itself, and once a second model in its place."""
    states, gathered = [], []
    for second in (False, True):
        engine = adapted(root)
        engine.initialize(references=Against.references)
        if second:
            engine._references = {"first": base._sharded.frozen}
        for step in range(3):
            engine.forward_backward(local_batch(step), Against())
            gathered.append(engine.model.training)
            engine.optimizer_step()
            engine.evaluate(local_batch(step), Against())
        states.append(adapter_of(engine))
    return {"apart": differing(*states), "trains": all(gathered)}


def by_directory(engine: FSDPEngine, root: str) -> list[str]:
    """Tensors that differ once the adapter's directory, with its optimizer, is loaded into a new engine."""
    meta = SaveLoadMeta(f"{root}/directory", weight_format="hf")
    engine.save(meta)
    again = adapted(root)
    again.initialize()
    again.load(meta)
    return differing(adapter_of(engine), adapter_of(again))


def fingerprints(root: str, first: str) -> dict[str, Any]:
    """Of the same base in other layouts and precisions; of another one what is said."""
    copies = adapted(root, "engine.mesh.replicate=2", "engine.mesh.shard=1", "engine.precision=bfloat16")
    copies.initialize(base=first)
    held = {p.dtype for p in copies.model.parameters() if not p.requires_grad}
    train(copies, 0)
    trained = {p.dtype for p in copies.model.parameters() if p.requires_grad}
    other = adapted(root)
    refused = attempt(lambda: other.initialize(base="0" * 16)).text
    return {"copies": copies.describe()["adapter"]["base"]["fingerprint"], "held": (held, trained), "refused": refused}


def of_ones_own(root: str, base: FSDPEngine) -> dict[str, Any]:
    own = AdapterConfig("tests.distributed.test_adapters:Offsets")
    engine = FSDPEngine(config_of(f"{root}/qwen3", own))
    engine.initialize(references=["first"])
    offsets = {name: t for name, t in snapshot(engine).items() if name.endswith(".by.offset")}
    seen = {"begins": {float(each) for t in offsets.values() for each in t}}
    before, batch = base_of(engine), local_batch(3)
    frozen = torch.cat([engine._references["first"](micro) for micro in engine._split(batch)])
    seen["base"] = torch.equal(frozen, base.forward(batch)) and not torch.equal(frozen, engine.forward(batch))
    train(engine, 0)
    seen["kept"] = differing(before, base_of(engine))
    seen["state"] = list(engine.state.state_dict()["model"])
    return seen


def go_on(rank: int, root: str, start: int, die_at: int | None, name: str, last: int = LAST) -> dict[str, Any]:
    """An attempt: from the checkpoint of step `start` on, a save every two steps, killed before a step."""
    torch.set_num_threads(1)
    engine = adapted(root)
    if start:
        saved = json.loads(Path(f"{root}/{name}-{start}/manifest.json").read_text())["info"]["adapter"]
        engine.initialize(weights=False, base=saved["base"]["fingerprint"])
        engine.load(SaveLoadMeta(f"{root}/{name}-{start}"))
    else:
        engine.initialize()
    for step in range(start, last):
        if step == die_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        train(engine, step)
        if step % 2:
            engine.save(SaveLoadMeta(f"{root}/{name}-{step + 1}"))
    return snapshot(engine)


def save_for_export(rank: int, root: str) -> None:
    """Checkpoints as a run writes them, and what their engines compute."""
    torch.set_num_threads(1)
    for number, kind in enumerate(KINDS):
        engine = adapted(root, kind=kind)
        engine.initialize()
        train(engine, 0)
        train(engine, 1)
        info = {"hf_config": models.architecture(engine._config.model), "tokenizer": "bytes", **engine.describe()}
        save(LocalStorage(f"{root}/kind-{number}"), {"engine": engine.state}, info, Ranks())
        logits = engine.forward(global_batch(0))
        if rank == 0:
            torch.save(logits, f"{root}/kind-{number}.pt")
    on_another = adapted(root)
    on_another._config = with_added(on_another._config, f"{root}/added")
    on_another.initialize()
    train(on_another, 0)
    info = {"hf_config": models.architecture(on_another._config.model), "tokenizer": "bytes", **on_another.describe()}
    save(LocalStorage(f"{root}/on-another"), {"engine": on_another.state}, info, Ranks())
    alone = attempt(lambda: on_another.save(SaveLoadMeta(f"{root}/alone", weight_format="hf"))).text
    assert "alone would be read on" in alone, alone
    logits = on_another.forward(global_batch(0))
    if rank == 0:
        torch.save(logits, f"{root}/on-another.pt")
    drawn = FSDPEngine(small_config("adapter={name: lora, args: {r: 2, target_modules: [q_proj]}}"))
    drawn.initialize()
    train(drawn, 0)
    info = {"hf_config": models.architecture(drawn._config.model), "tokenizer": "bytes", **drawn.describe()}
    save(LocalStorage(f"{root}/drawn"), {"engine": drawn.state}, info, Ranks())
    logits = drawn.forward(global_batch(0))
    if rank == 0:
        torch.save(logits, f"{root}/drawn.pt")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for kind in SIZES:
        write_base(root / kind, kind)
    write_base(root / "other", "qwen3", seed=2)
    write_added(root / "added", root / "qwen3")
    return root


@pytest.fixture(scope="module")
def seen(root: Path) -> list[dict[str, Any]]:
    return run_ranks(undisturbed, 2, str(root))


def test_the_base_is_read_frozen_and_kept_bit_for_bit(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert (rank["base read"], rank["base kept"]) == ([], [])
        assert rank["first logits"]


def test_a_checkpoint_has_the_adapter_alone(seen: list[dict[str, Any]], root: Path) -> None:
    assert seen[0]["state"] == []
    adapter, full = size_of(root / "whole-6"), size_of(root / "full")
    assert adapter < 0.03 * full, (adapter, full)


def test_a_run_says_what_is_trained_and_on_which_base(seen: list[dict[str, Any]], root: Path) -> None:
    said = seen[0]["said"]
    per_layer = 2 * 128 + 2 * 64 + 2 * 128 + 2 * 32  # A and B of q_proj and v_proj
    assert said["trained"] == 2 * per_layer
    assert said["parameters"] - said["trained"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(root / "qwen3").parameters()
    )
    assert said["base"].keys() == {"path", "fingerprint", "quick"}
    assert said["base"] == {**seen[1]["said"]["base"], "path": str(root / "qwen3")}
    assert json.loads((root / "whole-6/manifest.json").read_text())["info"]["adapter"] == said


def test_the_fingerprint_is_that_of_the_values_whatever_holds_them(seen: list[dict[str, Any]]) -> None:
    found = seen[0]["fingerprints"]
    assert found["copies"] == seen[0]["said"]["base"]["fingerprint"]
    assert found["held"] == ({torch.bfloat16}, {torch.float32})
    assert "model.path: the weights in" in found["refused"]
    assert "0000000000000000" in found["refused"]


def test_another_base_is_found_before_anything_starts(seen: list[dict[str, Any]], root: Path) -> None:
    there, other = (config_of(root / name, None) for name in ("qwen3", "other"))
    base = seen[0]["said"]["base"]
    preflight._check_base(base, there)
    preflight._check_base({**base, "quick": None}, other)  # the workers look at all of it
    with pytest.raises(ConfigError, match="are not those that this run's adapter was trained on") as caught:
        preflight._check_base(base, other)
    assert caught.value.key == "model.path"


def test_a_reference_is_the_base_itself(seen: list[dict[str, Any]]) -> None:
    assert [rank["reference"] for rank in seen] == [{"apart": [], "trains": True}] * 2


def test_the_directory_of_an_adapter_is_loaded_again(seen: list[dict[str, Any]]) -> None:
    assert [rank["hf"] for rank in seen] == [[], []]


def test_an_adapter_of_ones_own_is_trained_as_well(seen: list[dict[str, Any]]) -> None:
    names = [f"model.layers.{i}.mlp.down_proj.by.offset" for i in (0, 1)]
    assert seen[0]["own"] == {"begins": {0.5}, "base": True, "kept": [], "state": names}


def test_a_run_that_is_killed_at_two_steps_has_the_same_bits(seen: list[dict[str, Any]], root: Path) -> None:
    for start, die_at in ((0, 3), (2, 5)):
        with pytest.raises(RankFailed):
            run_ranks(go_on, 2, str(root), start, die_at, "killed")
    run_ranks(go_on, 2, str(root), 4, None, "killed")
    assert run_cli(["ckpt", "diff", str(root / "whole-6"), str(root / "killed-6")]) == 0


def test_two_ranks_then_one_then_two_stay_close(seen: list[dict[str, Any]], root: Path) -> None:
    (root / "whole-2").rename(root / "moved-2")
    run_ranks(go_on, 1, str(root), 2, None, "moved", 4)
    run_ranks(go_on, 2, str(root), 4, None, "moved")
    apart = differences(LocalStorage(root / "whole-6"), LocalStorage(root / "moved-6"))
    assert {each.name.split(".")[0] for each in apart} == {"engine"}
    assert max(each.max_abs or 0.0 for each in apart) < 1e-5, apart


@pytest.fixture(scope="module")
def saved(root: Path) -> Path:
    run_ranks(save_for_export, 2, str(root))
    return root


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**global_batch(0)).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_what_peft_reads(saved: Path, kind: str) -> None:
    number, base = list(KINDS).index(kind), KINDS[kind][0]
    out = saved / f"peft-{number}"
    assert run_cli(["ckpt", "export", str(saved / f"kind-{number}"), str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(saved / base)
    there = AutoModelForCausalLM.from_pretrained(saved / base, attn_implementation="sdpa")
    model = peft.PeftModel.from_pretrained(there, str(out))
    assert torch.equal(logits_of(model), torch.load(saved / f"kind-{number}.pt"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_export_gives_the_logits_of_the_adapter(saved: Path, kind: str) -> None:
    number, base_path = list(KINDS).index(kind), str(saved / KINDS[kind][0])
    out = saved / f"merged-{number}"
    export = ["ckpt", "export", str(saved / f"kind-{number}"), str(out), "--merged"]
    assert run_cli([*export, "--base", base_path]) == 0
    merged = logits_of(AutoModelForCausalLM.from_pretrained(out, attn_implementation="sdpa"))
    wanted = torch.load(saved / f"kind-{number}.pt")
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-4)
    base = logits_of(AutoModelForCausalLM.from_pretrained(base_path, attn_implementation="sdpa"))
    assert (wanted - base).abs().max() > 1e-2


def test_a_base_that_was_drawn_is_drawn_again_for_an_export(saved: Path) -> None:
    assert run_cli(["ckpt", "export", str(saved / "drawn"), str(saved / "drawn-out"), "--merged"]) == 0
    merged = logits_of(AutoModelForCausalLM.from_pretrained(saved / "drawn-out", attn_implementation="sdpa"))
    torch.testing.assert_close(merged, torch.load(saved / "drawn.pt"), rtol=1e-4, atol=1e-4)


def test_another_base_is_not_merged(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = ["ckpt", "export", str(saved / "kind-0"), str(saved / "refused"), "--merged", "--base"]
    assert run_cli([*export, str(saved / "other")]) == 1
    assert "is not the base that the adapter was trained on" in capsys.readouterr().err
    assert run_cli(export[:-1]) == 1
    assert f"is not read unasked: give --base {saved / 'qwen3'}" in capsys.readouterr().err
    assert not (saved / "refused").exists()


def test_an_adapter_on_a_base_with_another_one_added_is_exported_merged_only(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export, base = ["ckpt", "export", str(saved / "on-another")], ["--merged", "--base", str(saved / "qwen3")]
    assert run_cli([*export, str(saved / "alone-out")]) == 1
    assert f"was trained on {saved}/qwen3 with the adapter in {saved}/added added" in capsys.readouterr().err
    assert run_cli([*export, str(saved / "alone-out"), *base]) == 1
    assert f"--base {saved}/qwen3 --base-adapter {saved}/added" in capsys.readouterr().err
    assert run_cli([*export, str(saved / "both-out"), *base, "--base-adapter", str(saved / "added")]) == 0
    merged = logits_of(AutoModelForCausalLM.from_pretrained(saved / "both-out", attn_implementation="sdpa"))
    torch.testing.assert_close(merged, torch.load(saved / "on-another.pt"), rtol=1e-4, atol=1e-4)
    config = with_added(config_of(saved / "qwen3", AdapterConfig("lora", KINDS["attention"][1])), str(saved / "added"))
    with pytest.raises(ConfigError, match="must be null, as the adapter was trained on") as caught:
        preflight._check_adapter_export(config)
    assert caught.value.key == "export"
