"""Every optimizer on several ranks: beside one rank, killed, and gone on elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from areal_ray.engine import SaveLoadMeta
from areal_ray.engine.optim.grid import RankGrid
from tests.distributed.ranks import run_ranks
from tests.distributed.small import differing, evaluate, snapshot, start_engine, train

pytestmark = pytest.mark.distributed

STEPS = {"adamw": 8, "muon": 20, "adafactor": 8, "sgd": 8, "own": 8}
KILLED, RESIZED = (2, 5), (3, 6)
SIZES = (
    "model.config.num_hidden_layers=1",
    "model.config.hidden_size=32",
    "model.config.vocab_size=266",
    "train.seq_len=32",
    "train.steps=20",
)
EMA = "optim.ema={decay: 0.9, every_steps: 2}"
# Settings, and the largest |a-b| of any parameter after a run on two ranks, one and two again beside one on two alone.
# Measured (CPU, gloo, torch 2.13), one or two ranks throughout: adamw 1.2e-6, muon 3e-7, adafactor 3e-7, sgd 4e-9.
OPTIMIZERS = {
    "adamw": ([EMA], 1e-5),
    "muon": (["optim.name=muon", EMA], 1e-5),
    "adafactor": (["optim.name=adafactor", "optim.schedule=linear"], 1e-5),
    "sgd": (["optim.name=sgd", "optim.schedule=wsd", "optim.args={nesterov: true}"], 1e-6),
    "own": (["optim.name=torch.optim:RAdam", "optim.schedule=constant"], 1e-5),
}


def begin(name: str, *more: str) -> Any:
    return start_engine(*SIZES, *OPTIMIZERS[name][0], *more)


def go_on(engine: Any, first: int, last: int) -> dict[str, Any]:
    """Train from one step to another; what there is then, averages too. A collective."""
    for step in range(first, last):
        train(engine, step)
    averages = engine.state.state_dict().get("ema", {})
    return {**snapshot(engine), **{f"ema.{name}": tensor.full_tensor() for name, tensor in averages.items()}}


def on_two(rank: int, root: str) -> dict[str, Any]:
    """Each undisturbed, saving at some steps; and from each save on again, as after a kill."""
    seen = {}
    for name in OPTIMIZERS:
        engine, done = begin(name), 0
        for step in sorted({*KILLED, RESIZED[0]}):
            go_on(engine, done, step)
            engine.save(SaveLoadMeta(f"{root}/{name} {step}"))
            done = step
        whole, again = go_on(engine, done, STEPS[name]), []
        engine = begin(name)
        for step in KILLED:
            train(engine, 99)  # away from the state that is to come back
            engine.load(SaveLoadMeta(f"{root}/{name} {step}"))
            again.append(go_on(engine, step, STEPS[name]))
        seen[name] = {"whole": whole, "killed": [differing(each, whole) for each in again]}
    return seen


def on_one(rank: int, root: str) -> dict[str, Any]:
    """Each from the beginning to the end; and the middle of what begins and ends on two ranks."""
    seen = {}
    for name in OPTIMIZERS:
        engine = begin(name, "cluster.num_workers=1")
        seen[name] = go_on(engine, 0, STEPS[name])
        engine.load(SaveLoadMeta(f"{root}/{name} {RESIZED[0]}"))
        go_on(engine, *RESIZED)
        engine.save(SaveLoadMeta(f"{root}/{name} from one"))
    return seen


def back_on_two(rank: int, root: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, steps in STEPS.items():
        engine = start_engine(*SIZES, *OPTIMIZERS[name][0], weights=False)
        engine.load(SaveLoadMeta(f"{root}/{name} from one"))
        seen[name] = go_on(engine, RESIZED[1], steps)
        if name == "adamw":
            seen["averages"] = averages(engine, root)
    return seen


def averages(engine: Any, root: str) -> dict[str, Any]:
    """What becomes of averages: evaluated, begun with a checkpoint that has none, and with weights alone."""
    before = go_on(engine, 8, 8)
    plain = evaluate(engine, 7)
    with engine.averaged():
        seen = {"inside": snapshot(engine), "losses": (plain, evaluate(engine, 7))}
    seen |= {"before": before, "after": go_on(engine, 8, 8), "plain again": evaluate(engine, 7)}
    start_engine(*SIZES).save(SaveLoadMeta(f"{root}/without"))
    seen["begun"] = []
    for path, with_optim in (("without", True), ("adamw 3", False)):
        engine.load(SaveLoadMeta(f"{root}/{path}", with_optim=with_optim))
        seen["begun"].append(go_on(engine, 0, 0))
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def of_two(root: Path) -> list[dict[str, Any]]:
    return run_ranks(on_two, 2, str(root))


@pytest.fixture(scope="module")
def of_one(root: Path, of_two: Any) -> dict[str, Any]:
    return run_ranks(on_one, 1, str(root))[0]


@pytest.fixture(scope="module")
def back(root: Path, of_one: Any) -> list[dict[str, Any]]:
    return run_ranks(back_on_two, 2, str(root))


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], kind: str = "model.") -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a if name.startswith(kind))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_is_killed_ends_in_the_same_bits(of_two: list[dict[str, Any]], name: str) -> None:
    for seen in of_two:
        assert seen[name]["killed"] == [[]] * len(KILLED)
        assert differing(seen[name]["whole"], of_two[0][name]["whole"]) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_ranks_train_as_one_does(of_two: list[dict[str, Any]], of_one: dict[str, Any], name: str) -> None:
    assert furthest(of_two[0][name]["whole"], of_one[name]) < OPTIMIZERS[name][1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_on_two_ranks_one_and_two_ends_within_the_bound(
    of_two: list[dict[str, Any]], back: list[dict[str, Any]], name: str
) -> None:
    for seen in back:
        assert furthest(seen[name], of_two[0][name]["whole"]) < OPTIMIZERS[name][1]


def test_averages_are_put_in_place_of_the_weights_for_a_while(back: list[dict[str, Any]]) -> None:
    for rank in back:
        seen = rank["averages"]
        assert differing(seen["before"], seen["after"]) == []
        put = {name.replace("ema.", "model.", 1): t for name, t in seen["before"].items() if name.startswith("ema.")}
        assert differing({n: seen["inside"][n] for n in put}, put) == []
        assert seen["losses"][0] == seen["plain again"] != seen["losses"][1]


def test_averages_begin_with_the_weights_of_a_checkpoint_that_has_none(back: list[dict[str, Any]]) -> None:
    for rank in back:
        for seen in rank["averages"]["begun"]:
            averages = {name.removeprefix("ema."): t for name, t in seen.items() if name.startswith("ema.")}
            weights = {name.removeprefix("model."): t for name, t in seen.items() if name.startswith("model.")}
            assert len(averages) > 5
            assert differing(averages, weights) == []


MESHES = {"tensor": ["engine.mesh.tensor=2"], "hsdp": ["engine.mesh.replicate=2"]}


def on_four(rank: int) -> dict[str, Any]:
    """Where each rank's parts are said to lie and where they do; steps of Muon and Adafactor."""
    seen: dict[str, Any] = {}
    for name, mesh in MESHES.items():
        for optimizer in ("muon", "adafactor"):
            engine = start_engine(*SIZES, "cluster.num_workers=4", *mesh, f"optim.name={optimizer}")
            grid, boxes = RankGrid(engine.dims.mesh), {}
            for parameter_name, p in engine.model.named_parameters():
                (chunk,) = p.__create_chunk_list__()  # type: ignore[operator]
                own = [(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True)]
                said = [grid.box(p, each) for each in range(4)]
                boxes[parameter_name] = own, [([(s.start, s.stop) for s in box], first) for box, first in said]
            seen[name] = boxes
            for step in range(2):
                train(engine, step)
            seen[f"{name} {optimizer}"] = snapshot(engine)
    return seen


@pytest.fixture(scope="module")
def of_four() -> list[dict[str, Any]]:
    return run_ranks(on_four, 4)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_rank_knows_which_part_lies_where(of_four: list[dict[str, Any]], mesh: str) -> None:
    for rank, seen in enumerate(of_four):
        for name, (own, said) in seen[mesh].items():
            assert said[rank][0] == own, name
            assert said == of_four[0][mesh][name][1], name
    for name, (_, said) in of_four[0][mesh].items():  # each part counts once
        counted = [box for box, first in said if first]
        everything = {str(box) for box, _ in said}
        assert sorted(map(str, counted)) == sorted(everything), name


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_any_mesh_trains_alike(of_four: list[dict[str, Any]], optimizer: str) -> None:
    first = of_four[0][f"hsdp {optimizer}"]
    for mesh in MESHES:
        for rank in of_four:
            assert differing(rank[f"{mesh} {optimizer}"], of_four[0][f"{mesh} {optimizer}"]) == []
        assert furthest(of_four[0][f"{mesh} {optimizer}"], first) < 1e-6
