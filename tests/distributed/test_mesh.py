"""One run on many meshes: FSDP, HSDP and tensor parallelism begin alike, read each other's saves and go on alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from areal_ray import ckpt
from areal_ray.checkpoint import AsyncWriter, load, save
from areal_ray.engine import FSDPEngine, SaveLoadMeta
from areal_ray.objectives import next_token_loss, predicted_tokens
from areal_ray.ranks import Ranks
from areal_ray.storage import LocalStorage
from tests.distributed.ranks import run_ranks
from tests.distributed.small import (
    GLOBAL_BATCH,
    SEQ_LEN,
    VOCABULARY,
    differing,
    erase,
    global_batch,
    small_config,
    snapshot,
    start_engine,
)

pytestmark = pytest.mark.distributed

CUT, SWITCH, LAST = 2, 3, 5
# Largest |a-b| of any parameter, in float32 after 3 steps on another mesh than the undisturbed run's. Measured (CPU,
# gloo, torch 2.13): 1.2e-7, one unit in the last place of a norm's weight, on 4 ranks and on the ways back; 2.0e-8 with
# tensor groups; 8.4e-9 on one rank. This is 5 times the largest. The steps themselves move parameters by up to 4.2e-3.
APART = 6e-7
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
        self._id_of = {tuple(data[np.asarray([i])][0].tolist()): i for i in range(len(data))}
        self.state = {"engine": self.engine.state, "data": self.batches}
        self.steps: list[dict[str, Any]] = []

    def train(self, last: int) -> Run:
        while (step := self.engine.state.state_dict()["schedule"]["step"]) < last:
            ids, batch = self.batches.ids(self.batches.next_sample), next(self.batches)
            rows = [self._id_of[tuple(row)] for row in batch["input_ids"].tolist()]
            stats = self.engine.train_batch(batch, next_token_loss, predicted_tokens)
            self.steps.append({"step": step, "ids": ids, "rows": rows, "lr": stats["lr"], "loss": float(stats["loss"])})
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
    run.engine.before_update = in_background.fence
    saved = in_background.begin(LocalStorage(f"{root}/{mesh} later"), run.state, {})
    run.train(LAST)
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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def of_two(root: Path) -> list[dict[str, Any]]:
    return run_ranks(two, 2, str(root))


@pytest.fixture(scope="module")
def undisturbed(of_two: list[dict[str, Any]]) -> dict[str, Any]:
    return of_two[0]["undisturbed"]


@pytest.fixture(scope="module")
def of_four(root: Path, of_two: Any) -> list[dict[str, Any]]:
    return run_ranks(four, 4, str(root))


@pytest.fixture(scope="module")
def resumed(root: Path, of_two: list[dict[str, Any]], of_four: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What each rank of each mesh saw that went on from the cut."""
    worlds = [of_two, of_four, run_ranks(one, 1, str(root))]
    return {mesh: [rank[mesh] for rank in world] for world in worlds for mesh in MESHES if mesh in world[0]}


@pytest.fixture(scope="module")
def came_back(root: Path, resumed: Any) -> list[dict[str, Any]]:
    return run_ranks(back, 2, str(root))


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a if name.startswith("model."))


def test_the_mesh_has_the_dimensions_that_are_not_one_and_always_shard(
    resumed: dict[str, list[dict[str, Any]]],
) -> None:
    meshes = {mesh: ranks[0]["mesh"] for mesh, ranks in resumed.items()}
    assert meshes == {
        "fsdp 1": {"shard": 1},
        "fsdp 2": {"shard": 2},
        "tensor 2": {"shard": 1, "tensor": 2},
        "fsdp 4": {"shard": 4},
        "hsdp 2x2": {"replicate": 2, "shard": 2},
        "fsdp 2 tensor 2": {"shard": 2, "tensor": 2},
        "hsdp 2x1 tensor 2": {"replicate": 2, "shard": 1, "tensor": 2},
    }


@pytest.mark.parametrize("mesh", MESHES)
def test_first_weights_are_the_same_on_any_mesh(
    mesh: str, undisturbed: dict[str, Any], resumed: dict[str, list[dict[str, Any]]]
) -> None:
    for seen in resumed[mesh]:
        assert differing(seen["first"], undisturbed["first"]) == []


@pytest.mark.parametrize("mesh", MESHES)
def test_any_mesh_loads_what_another_saved_bit_for_bit(
    mesh: str, undisturbed: dict[str, Any], resumed: dict[str, list[dict[str, Any]]]
) -> None:
    for seen in resumed[mesh]:
        assert differing(seen["loaded"], undisturbed["cut"]) == []
        assert differing(seen["from hf"], undisturbed["cut"], only="model.") == []


@pytest.mark.parametrize("mesh", MESHES)
def test_the_digest_and_the_hf_weights_do_not_depend_on_the_mesh(mesh: str, root: Path, resumed: Any) -> None:
    assert ckpt.digest(LocalStorage(root / mesh)) == ckpt.digest(LocalStorage(root / "cut"))
    assert differing(hf_weights(root / f"{mesh} hf"), hf_weights(root / "cut hf")) == []


def hf_weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_run_goes_on_with_the_same_samples_steps_and_rates_on_any_mesh(
    mesh: str, undisturbed: dict[str, Any], resumed: dict[str, list[dict[str, Any]]]
) -> None:
    ranks = resumed[mesh]
    for i, right in enumerate(undisturbed["steps"][CUT:]):
        for rank in ranks:
            mine = rank["steps"][i]
            assert [mine[what] for what in ("step", "ids", "lr")] == [right[what] for what in ("step", "ids", "lr")]
            assert mine["loss"] == pytest.approx(right["loss"], rel=1e-5)
            part, parts = rank["part"]
            assert mine["rows"] == right["ids"][part::parts]
        assert {rank["part"] for rank in ranks} == {(part, ranks[0]["part"][1]) for part in range(ranks[0]["part"][1])}


def test_the_ranks_of_a_tensor_group_have_the_same_rows(resumed: dict[str, list[dict[str, Any]]]) -> None:
    assert [rank["part"] for rank in resumed["tensor 2"]] == [(0, 1), (0, 1)]
    for mesh in ("fsdp 2 tensor 2", "hsdp 2x1 tensor 2"):
        assert [rank["part"] for rank in resumed[mesh]] == [(0, 2), (0, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize("mesh", ELSEWHERE)
def test_a_run_that_goes_on_on_another_mesh_ends_within_rounding(
    mesh: str, undisturbed: dict[str, Any], resumed: dict[str, list[dict[str, Any]]]
) -> None:
    moved = furthest(undisturbed["tensors"], undisturbed["cut"])
    for seen in resumed[mesh]:
        assert furthest(seen["tensors"], undisturbed["tensors"]) < APART < 0.01 * moved


@pytest.mark.parametrize("mesh", MESHES)
def test_all_ranks_of_a_mesh_end_with_the_same_bits(mesh: str, resumed: dict[str, list[dict[str, Any]]]) -> None:
    """Norms are whole on every rank of a tensor group, and nothing sends them: they must not drift apart."""
    for seen in resumed[mesh][1:]:
        assert differing(seen["tensors"], resumed[mesh][0]["tensors"]) == []


def test_a_run_that_goes_on_on_its_own_mesh_ends_with_the_same_bits(
    undisturbed: dict[str, Any], resumed: dict[str, list[dict[str, Any]]]
) -> None:
    for seen in resumed["fsdp 2"]:
        assert differing(seen["tensors"], undisturbed["tensors"]) == []


@pytest.mark.parametrize("mesh", ELSEWHERE)
def test_a_run_comes_back_from_another_mesh(
    mesh: str, undisturbed: dict[str, Any], came_back: list[dict[str, Any]]
) -> None:
    for rank in came_back:
        assert [s["ids"] for s in rank[mesh]["steps"]] == [s["ids"] for s in undisturbed["steps"][SWITCH:]]
        assert furthest(rank[mesh]["tensors"], undisturbed["tensors"]) < APART
        assert differing(rank[mesh]["from hf"], undisturbed["cut"], only="model.") == []


@pytest.mark.parametrize("mesh", ["fsdp 2", "tensor 2"])
def test_with_dropout_a_resumed_run_ends_with_the_same_bits(mesh: str, of_two: list[dict[str, Any]]) -> None:
    for rank in of_two:
        seen = rank[f"dropout, {mesh}"]
        assert differing(seen["resumed"], seen["undisturbed"]) == []
        # Other masks on what the ranks of a tensor group hold whole would take their norms apart.
        assert differing(seen["undisturbed"], of_two[0][f"dropout, {mesh}"]["undisturbed"]) == []


def test_masks_differ_between_parts_of_the_batch_and_not_within_a_tensor_group(of_four: list[dict[str, Any]]) -> None:
    first, same, second, same_as_second = (rank["dropout"] for rank in of_four)
    assert 0.05 < float(first.float().mean()) < 0.2
    assert torch.equal(first, same)
    assert torch.equal(second, same_as_second)
    assert not torch.equal(first, second)
