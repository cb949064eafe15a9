"""One run on many meshes: FSDP, HSDP and tensor parallelism begin alike, read each other's saves and go on alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints
from tests.distributed.meshes import CUT, ELSEWHERE, MESHES, SWITCH, back, four, one, two
from tests.distributed.ranks import run_ranks
from tests.distributed.small import differing

pytestmark = pytest.mark.distributed

# Largest |a-b| of any parameter, in float32 after 3 steps on another mesh than the undisturbed run's. Measured (CPU,
# gloo, torch 2.13): 1.2e-7, one unit in the last place of a norm's weight, on 4 ranks and on the ways back; 2.0e-8 with
# tensor groups; 8.4e-9 on one rank. This is 5 times the largest. The steps themselves move parameters by up to 4.2e-3.
APART = 6e-7


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
    assert checkpoints.digest(LocalStorage(root / mesh)) == checkpoints.digest(LocalStorage(root / "cut"))
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
