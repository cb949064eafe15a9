"""Runs on many meshes: begun, cut, gone on elsewhere and come back, and what each rank saw of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from areal_ray.checkpoint import AsyncWriter, load, save
from areal_ray.distributed import Ranks
from areal_ray.engine import FSDPEngine, SaveLoadMeta
from areal_ray.engine.objectives import next_token_loss, predicted_tokens
from areal_ray.storage import LocalStorage
from tests.distributed.small import (
    GLOBAL_BATCH,
    SEQ_LEN,
    VOCABULARY,
    erase,
    global_batch,
    one_step,
    small_config,
    snapshot,
    start_engine,
)

CUT, SWITCH, LAST = 2, 3, 5
# 266 rows of embeddings: each of two tensor ranks has 133, an odd number for two shards.
ALL = (f"train.steps={LAST}", "model.config.vocab_size=266")
FOUR = "cluster.num_workers=4"
MESHES = {
    "fsdp 1": ["cluster.num_workers=1"],
    "fsdp 2": [],
    "tensor 2": ["engine.mesh.tensor=2"],
    "fsdp 4": [FOUR],
    "hsdp 2x2": [FOUR, "engine.mesh.replicate=2"],
    "fsdp 2 tensor 2": [FOUR, "engine.mesh.tensor=2"],
    "hsdp 2x1 tensor 2": [FOUR, "engine.mesh.replicate=2", "engine.mesh.tensor=2"],
}
OF_FOUR = [name for name, overrides in MESHES.items() if FOUR in overrides]
ELSEWHERE = ["fsdp 1", "tensor 2", *OF_FOUR]
# A model with dropout on what all ranks of a tensor group hold, and with biases that are and that are not split.
DROPOUT = (
    "model.config={model_type: starcoder2, vocab_size: 264, hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 1, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8, "
    "bos_token_id: 256, eos_token_id: 256, attention_dropout: 0.1, residual_dropout: 0.1, embedding_dropout: 0.1, "
    "tie_word_embeddings: false}"
)


def meta(path: str) -> SaveLoadMeta:
    return SaveLoadMeta(path, "hf", with_optim=False)


class Run:
    """A run on one mesh, as a worker wires it: engine and data cursor, and what was seen at every step."""

    def __init__(self, mesh: str) -> None:
        # Here, so that this module can be collected where there is a torch but no grain.
        from areal_ray.data import GlobalBatches, PackedTokens

        self.engine = start_engine(*ALL, *MESHES[mesh])
        # 12 sequences in batches of 8: the second batch reaches into the second epoch.
        data = PackedTokens(np.random.default_rng(0).integers(0, VOCABULARY, 12 * SEQ_LEN), SEQ_LEN)
        self.batches = GlobalBatches(data, 0, GLOBAL_BATCH, self.engine.dp_rank, self.engine.dp_size)
        self._id_of = {tuple(data[np.asarray([i])]["input_ids"][0].tolist()): i for i in range(len(data))}
        self.state = {"engine": self.engine.state, "data": self.batches}
        self.steps: list[dict[str, Any]] = []

    def train(self, last: int, fence: Callable[[], None] = lambda: None) -> Run:
        while (step := self.engine.state.state_dict()["schedule"]["step"]) < last:
            ids, batch = self.batches.ids(self.batches.next_sample), next(self.batches)
            rows = [self._id_of[tuple(row)] for row in batch["input_ids"].tolist()]
            stats = one_step(self.engine, batch, fence)
            self.steps.append({"step": step, "ids": ids, "rows": rows, "lr": stats["lr"], "loss": stats["loss"]})
        return self

    def save(self, path: str) -> None:
        save(LocalStorage(path), self.state, {}, Ranks())

    def load(self, path: str) -> Run:
        load(LocalStorage(path), self.state, Ranks())
        return self

    def seen(self) -> dict[str, Any]:
        engine = self.engine
        return {
            "steps": self.steps,
            "tensors": snapshot(engine),
            "part": (engine.dp_rank, engine.dp_size),
            "mesh": engine.describe()["mesh"],
        }


def go_on(mesh: str, root: str) -> dict[str, Any]:
    """From the cut of the run of two ranks to its end, saving what was loaded, in both formats, and after a step."""
    run = Run(mesh)
    first = snapshot(run.engine)
    run.engine.load(meta(f"{root}/cut hf"))
    from_hf = snapshot(run.engine)
    erase(run.engine)
    run.load(f"{root}/cut")
    loaded = snapshot(run.engine)
    run.save(f"{root}/{mesh}")
    run.engine.save(meta(f"{root}/{mesh} hf"))
    run.train(SWITCH)
    in_background = AsyncWriter(Ranks(), Ranks(dist.new_group(backend="gloo")))
    saved = in_background.begin(LocalStorage(f"{root}/{mesh} later"), run.state, {})
    run.train(LAST, in_background.fence)
    saved.result()
    in_background.close()
    return {"first": first, "from hf": from_hf, "loaded": loaded, **run.seen()}


def two(rank: int, root: str) -> dict[str, Any]:
    run = Run("fsdp 2")
    first = snapshot(run.engine)
    run.train(CUT)
    run.save(f"{root}/cut")
    run.engine.save(meta(f"{root}/cut hf"))
    cut = snapshot(run.engine)
    run.train(LAST)
    seen = {"undisturbed": {"first": first, "cut": cut, **run.seen()}}
    for mesh in ("fsdp 2", "tensor 2"):
        seen[mesh] = go_on(mesh, root)
        seen[f"dropout, {mesh}"] = with_dropout(MESHES[mesh], f"{root}/dropout {mesh}")
    return seen


def with_dropout(overrides: list[str], path: str) -> dict[str, Any]:
    """Two steps, and from a save after the first of them the second again, by another engine."""
    engine = dropping(overrides)
    step(engine)
    engine.save(SaveLoadMeta(path))
    step(engine)
    again = dropping(overrides)
    again.load(SaveLoadMeta(path))
    torch.manual_seed(99 + dist.get_rank())
    step(again)
    return {"undisturbed": snapshot(engine), "resumed": snapshot(again)}


def dropping(overrides: list[str]) -> FSDPEngine:
    engine = FSDPEngine(small_config(DROPOUT, *overrides, sizes=False))
    engine.initialize()
    return engine


def step(engine: FSDPEngine) -> torch.Tensor:
    """A step on the same rows on every rank; what was dropped out of their embeddings, (2, S, hidden) booleans."""
    masks = []
    layer = engine.model.get_submodule("model.layers.0")
    hook = layer.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[0] == 0))
    engine.train_batch({name: t[:2] for name, t in global_batch(0).items()}, next_token_loss, predicted_tokens)
    hook.remove()
    return masks[0]


def four(rank: int, root: str) -> dict[str, Any]:
    seen: dict[str, Any] = {mesh: go_on(mesh, root) for mesh in OF_FOUR}
    seen["dropout"] = step(dropping(MESHES["fsdp 2 tensor 2"]))
    return seen


def one(rank: int, root: str) -> dict[str, Any]:
    return {"fsdp 1": go_on("fsdp 1", root)}


def back(rank: int, root: str) -> dict[str, Any]:
    """On two ranks again, from what every other mesh has saved a step later."""
    seen = {}
    for mesh in ELSEWHERE:
        run = Run("fsdp 2")
        run.engine.load(meta(f"{root}/{mesh} hf"))
        from_hf = snapshot(run.engine)
        seen[mesh] = {"from hf": from_hf, **run.load(f"{root}/{mesh} later").train(LAST).seen()}
    return seen
