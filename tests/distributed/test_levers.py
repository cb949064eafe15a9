"""Levers for memory and speed, on two ranks: units that are computed again, compiled, or offloaded."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from areal_ray.distributed import parallelize
from areal_ray.engine import FSDPEngine, SaveLoadMeta
from areal_ray.engine.objectives import FunctionObjective, LanguageModeling, next_token_loss, predicted_tokens
from areal_ray.engine.optim.gradients import _norm_of_offloaded
from tests.distributed.ranks import run_ranks
from tests.distributed.small import attempt, differing, local_batch, small_config, snapshot, train

pytestmark = pytest.mark.distributed

WAYS = {"none": "none", "full": "true", "second": "2", "selective": "selective"}
SOME = {"tensor": ("none", "selective"), "experts": ("none", "full", "selective")}  # of these ways, where not of all
EXPERTS = ("model_type=qwen3_moe", "num_experts=4", "num_experts_per_tok=2", "moe_intermediate_size=32")
LAYERS = "model.config.num_hidden_layers=3"
OWN = ["model=pretrained", "model.path=null", f"model.factory={__name__}:OwnModel"]
MODELS = {
    "dense": [LAYERS, "model.config.attention_dropout=0.1"],
    "experts": [LAYERS, *(f"model.config.{each}" for each in EXPERTS)],
    "own": [*OWN, "model.shard_units=[Block]"],
    "tensor": [LAYERS, "engine.mesh.tensor=2"],
}
ONE_BATCH = "train.micro_batch_size=8"  # of which there is one graph
COMPILED = {"dense": []}
COMPILED["selective, chunked"] = ["engine.activation_checkpointing=selective", "model.loss=chunked"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor, scale: float) -> torch.Tensor:
        return hidden + scale * self.down(torch.nn.functional.silu(self.up(hidden)))


class OwnModel(nn.Module):
    """A model that knows nothing of activation checkpointing."""

    def __init__(self, vocab_size: int = 264, width: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.table(input_ids)
        for block in self.blocks:
            hidden = block(hidden, scale=0.5)
        return self.head(hidden)


class Living(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are there still."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[weakref.ref[Any], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if type(leaf) is torch.Tensor:
                storage = leaf.untyped_storage()
                self._sizes[weakref.ref(storage, self._forget)] = storage.nbytes()
        return made

    def _forget(self, gone: weakref.ref[Any]) -> None:
        self._sizes.pop(gone, None)

    def bytes(self) -> int:
        return sum(self._sizes.values())


def pull_them(rank: int, path: str) -> dict[str, Any]:
    dist.init_process_group("gloo")  # one for all engines
    return {**_recomputed(), **_offloaded(path)}


def _recomputed() -> dict[str, Any]:
    """What a step of each model is, each way; and how much memory its forward pass has left behind."""
    seen: dict[str, Any] = {}
    for model, overrides in MODELS.items():
        for way in SOME.get(model, tuple(WAYS)):
            with _started(*overrides, f"engine.activation_checkpointing={WAYS[way]}") as engine:
                seen[f"{model} {way}"] = _step(engine)
    seen["no units"] = attempt(lambda: _start(*OWN, "engine.activation_checkpointing=full"))
    return seen


def compile_it(rank: int, path: str) -> dict[str, Any]:
    """Steps of models that are compiled by a backend which computes the same bits; a checkpoint goes into each."""
    dist.init_process_group("gloo")
    parallelize.BACKEND = "aot_eager"
    seen: dict[str, Any] = {}
    with _started(ONE_BATCH) as engine:
        engine.save(SaveLoadMeta(path))
        train(engine, seed=0)
        seen["eager"] = snapshot(engine)
    for name, overrides in COMPILED.items():
        torch._dynamo.utils.counters.clear()
        with _started("engine.compile=true", ONE_BATCH, *overrides, weights=False) as engine:
            engine.load(SaveLoadMeta(path))
            calls = _count_calls(engine)
            train(engine, seed=0)
            seen[f"calls {name}"] = len(calls), len(engine.shard_units)
            seen[f"compiled {name}"] = snapshot(engine)
            seen[f"graphs {name}"] = {kind: dict(found) for kind, found in torch._dynamo.utils.counters.items()}
    return seen


def _count_calls(engine: FSDPEngine) -> list[nn.Module]:
    calls: list[nn.Module] = []
    for unit in engine.shard_units:
        unit.register_forward_pre_hook(lambda unit, _: calls.append(unit))
    return calls


def _offloaded(path: str) -> dict[str, Any]:
    policies: list[Any] = []
    shard = parallelize.fully_shard

    def spy(module: nn.Module, **how: Any) -> Any:
        policies.append(how["offload_policy"])
        return shard(module, **how)

    seen: dict[str, Any] = {}
    with _started() as engine:
        engine.save(SaveLoadMeta(path))
        train(engine, seed=0)
        seen["not offloaded"] = snapshot(engine)
    parallelize.fully_shard = spy  # type: ignore[assignment]
    for mesh in ("engine.mesh.tensor=1", "engine.mesh.tensor=2"):
        with _started(mesh, weights=False, offload="all") as engine:
            engine.load(SaveLoadMeta(path))
            result = engine.forward_backward(local_batch(0, engine), LanguageModeling())
            norm = torch.stack([_norm_of_offloaded(group, engine.device) for group in _by_mesh(engine)]).norm()
            seen[mesh] = float(result.grad_norm), float(norm)
            engine.optimizer_step(torch.zeros(()))
            seen[f"state {mesh}"] = snapshot(engine)
            units = len(engine.shard_units)
    seen["policies"] = policies, 2 * (units + 1)
    return seen


def _by_mesh(engine: FSDPEngine) -> list[list[nn.Parameter]]:
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in engine.model.parameters():
        found.setdefault(parameter.device_mesh, []).append(parameter)  # type: ignore[attr-defined]
    return list(found.values())


def offload_on_gpu(rank: int, path: str) -> dict[str, Any]:
    """Steps with and without, the last of them refused on the device; then a checkpoint of each goes into the other."""
    seen: dict[str, Any] = {}
    on_gpu = ["cluster.use_gpu=true", "engine.precision=float32", "optim.ema={}"]
    for offload, other in (("none", "all"), ("all", "none")):
        with _started(*on_gpu, offload=offload) as engine:
            steps = [train(engine, seed=seed) for seed in range(2)]
            before = snapshot(engine)
            engine.forward_backward(local_batch(2, engine), LanguageModeling())
            engine.optimizer_step(torch.ones((), device=engine.device))
            places = {parameter.device.type for parameter in engine.model.parameters()}
            seen[offload] = steps, before, snapshot(engine), places
            engine.save(SaveLoadMeta(f"{path}-{offload}"))
        with _started(*on_gpu, weights=False, offload=other) as engine:
            engine.load(SaveLoadMeta(f"{path}-{offload}"))
            seen[f"{offload} to {other}"] = snapshot(engine)
    return seen


@contextmanager
def _started(*overrides: str, weights: bool = True, offload: Any = "none") -> Iterator[FSDPEngine]:
    engine = _start(*overrides, weights=weights, offload=offload)
    yield engine
    engine.destroy()


def _start(*overrides: str, weights: bool = True, offload: Any = "none") -> FSDPEngine:
    config = small_config(*overrides, sizes="model=pretrained" not in overrides)
    engine = FSDPEngine(replace(config, engine=replace(config.engine, offload=offload)))  # which is for GPUs alone
    engine.initialize(weights=weights)
    return engine


def _step(engine: FSDPEngine) -> dict[str, Any]:
    left: list[int] = []

    def loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        left.append(living.bytes())
        return next_token_loss(logits, batch)

    with Living() as living:
        result = engine.forward_backward(local_batch(0, engine), FunctionObjective(loss, predicted_tokens))
    gradients = {name: p.grad.to_local().clone() for name, p in engine.model.named_parameters()}  # type: ignore[union-attr]
    return {"loss": float(result.loss), "norm": float(result.grad_norm), "gradients": gradients, "left": left[0]}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(pull_them, 2, str(tmp_path_factory.mktemp("levers") / "checkpoint"), time_limit_s=900)[0]


@pytest.mark.parametrize("model", MODELS)
def test_what_is_computed_again_has_every_bit_and_less_is_kept(seen: dict[str, Any], model: str) -> None:
    steps = {way: seen[f"{model} {way}"] for way in SOME.get(model, tuple(WAYS))}
    for way, step in steps.items():
        assert (step["loss"], step["norm"]) == (steps["none"]["loss"], steps["none"]["norm"]), way
        assert differing(step["gradients"], steps["none"]["gradients"]) == [], way
    left = {way: step["left"] for way, step in steps.items()}
    for less, more in (("full", "second"), ("second", "none"), ("full", "selective"), ("selective", "none")):
        assert less not in left or more not in left or left[less] < left[more], (less, more)


def test_a_model_without_units_is_told_so(seen: dict[str, Any]) -> None:
    assert seen["no units"].error == "ConfigError"
    assert "model.shard_units" in seen["no units"].text


@pytest.fixture(scope="module")
def compiled_ones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(compile_it, 1, str(tmp_path_factory.mktemp("compiled") / "checkpoint"), time_limit_s=900)[0]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_units_are_whole_graphs_with_the_same_names_and_bits(compiled_ones: dict[str, Any], name: str) -> None:
    seen = compiled_ones
    compiled, eager = seen[f"compiled {name}"], seen["eager"]
    assert compiled.keys() == eager.keys()
    if "chunked" in name:
        for each in eager:
            torch.testing.assert_close(compiled[each], eager[each], rtol=1e-5, atol=1e-5, msg=each)
    else:
        assert differing(compiled, eager) == []
    graphs = seen[f"graphs {name}"]
    assert graphs["stats"]["unique_graphs"] > 0
    assert not graphs.get("graph_break")
    calls, units = seen[f"calls {name}"]
    assert calls == units  # hooks stay outside of what is compiled, those of FSDP as well


def test_all_units_are_offloaded_and_steps_are_the_same(seen: dict[str, Any]) -> None:
    policies, units = seen["policies"]
    assert len(policies) == units
    assert all(isinstance(policy, CPUOffloadPolicy) for policy in policies)
    assert differing(seen["state engine.mesh.tensor=1"], seen["not offloaded"]) == []
    for mesh in ("engine.mesh.tensor=1", "engine.mesh.tensor=2"):
        norm, of_offloaded = seen[mesh]
        assert of_offloaded == pytest.approx(norm, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_offloaded_trains_as_on_the_gpu(tmp_path: Path) -> None:
    (seen,) = run_ranks(offload_on_gpu, 1, str(tmp_path / "checkpoint"), gpu=True)
    steps, _, state, places = seen["none"]
    offloaded, before, after, where = seen["all"]
    assert (places, where) == ({"cuda"}, {"cpu"})
    for mine, right in zip(offloaded, steps, strict=True):
        assert mine == pytest.approx(right, rel=1e-4)
    for name in state:
        torch.testing.assert_close(after[name], state[name], rtol=1e-3, atol=1e-5, msg=name)
    assert differing(after, before) == []  # the refused step
    assert differing(seen["all to none"], after) == differing(seen["none to all"], state) == []
