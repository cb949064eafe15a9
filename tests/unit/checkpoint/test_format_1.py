"""Checkpoints of format 1, which have all checksums in the manifest and their layout in `.metadata`."""

import os
from pathlib import Path

import pytest
import torch

from areal_ray.checkpoint import Catalog, CheckpointDamaged, StoredState, load, save
from areal_ray.checkpoint.format.manifest import verify
from areal_ray.distributed import RankError, Ranks
from areal_ray.storage import LocalStorage

from .boxes import OF_FORMAT_1, Box, bits, flip, of_format_1

pytestmark = pytest.mark.unit


@pytest.fixture
def old(tmp_path):
    return of_format_1(tmp_path)


def blank():
    return Box(**{name: torch.full_like(tensor, 9) for name, tensor in OF_FORMAT_1.items()}, count=0)


def test_it_is_loaded_bit_for_bit(old):
    box = blank()
    load(old, {"box": box}, Ranks())
    assert box.tree.pop("count") == 7
    assert {name: bits(tensor) for name, tensor in box.tree.items()} == {n: bits(t) for n, t in OF_FORMAT_1.items()}


def test_tools_read_it_and_it_is_equal_to_the_same_state_of_now(old, tmp_path):
    verify(old)
    (entry,) = Catalog(LocalStorage(tmp_path)).entries()
    assert entry.problem is None
    now = LocalStorage(tmp_path / "now")
    save(now, {"box": Box(**OF_FORMAT_1, count=7)}, {}, Ranks())
    states = [StoredState(each) for each in (old, now)]
    assert states[0].names == states[1].names
    assert states[0].values == states[1].values
    one, other = ({name: bits(tensor) for name, tensor in state.tensors(state.names)} for state in states)
    assert one == other


@pytest.mark.parametrize("name", ["shard-00000.distcp", "shard-00001.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("damage", [os.remove, lambda path: flip(path, 20)])
def test_its_damage_is_found(old, name, damage):
    damage(Path(old.location, name))
    with pytest.raises(RankError) as caught:
        load(old, {"box": blank()}, Ranks())
    assert caught.value.only(CheckpointDamaged)
    assert f"CheckpointDamaged: {name}: " in str(caught.value)
