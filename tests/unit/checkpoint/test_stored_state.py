"""Reading whole tensors of a checkpoint, ahead and in parts."""

import pytest
import torch

from areal_ray.checkpoint import CheckpointDamaged, StoredState, reader
from areal_ray.checkpoint.format.sums import Sums

from .boxes import bits, do_damage, save_box

pytestmark = pytest.mark.unit


@pytest.fixture
def directory(tmp_path):
    """Tensors of many sizes, the largest of 4000 bytes."""
    sizes = (1, 7, 1000, 3, 3, 3, 500, 2)
    tree = {f"{n:02}": torch.arange(float(size)) + n for n, size in enumerate(sizes)}
    return save_box(tmp_path, **tree, empty=torch.empty(0, 3), scalar=torch.tensor(3))


@pytest.mark.parametrize("part", [1, 100, 4000, 1 << 20])
def test_tensors_read_ahead_are_those_read_alone(directory, monkeypatch, part):
    state = StoredState(directory)
    alone = {name: bits(state.tensor(name)) for name in state.names}
    monkeypatch.setattr(reader, "_PART_BYTES", part)
    assert {name: bits(tensor) for name, tensor in state.tensors(state.names)} == alone
    some = [state.names[5], state.names[2]]
    assert [name for name, _ in state.tensors(some)] == some


def test_damage_is_found_in_its_place(directory, monkeypatch):
    do_damage(directory, "last bit of the shard")
    monkeypatch.setattr(reader, "_PART_BYTES", 1)
    state = StoredState(directory)
    with pytest.raises(CheckpointDamaged, match="checksum"):
        list(state.tensors(state.names))


def test_a_part_is_no_larger_than_it_may_be(directory, monkeypatch):
    monkeypatch.setattr(reader, "_PART_BYTES", 2100)
    state = StoredState(directory)
    parts = list(state._parts(state.names))
    assert [name for _, names in parts for name in names] == state.names
    assert all(size <= 2100 or len(names) == 1 for size, names in parts)
    assert len(parts) < len(state.names)


def test_the_table_of_checksums_is_read_once_by_all_threads(directory, monkeypatch):
    read = []
    decode = Sums.decode
    monkeypatch.setattr(Sums, "decode", lambda *args: read.append(args[1]) or decode(*args))
    monkeypatch.setattr(reader, "_PART_BYTES", 1)
    state = StoredState(directory)
    assert len(list(state.tensors(state.names))) == len(state.names)
    assert read == ["shard-00000.sums"]
