"""What describes a checkpoint is distrusted though its checksums are right: nonsense is damage, in one line."""

import json
from pathlib import Path

import pytest

from areal_ray.checkpoint import CheckpointDamaged, StoredState

from .boxes import (
    damage_found,
    forge,
    load_box,
    save_box,
    shard,
    weights,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def directory(tmp_path):
    return save_box(tmp_path, **weights(), count=7)


def layout(**changes):
    """A layout of `weights` in one file."""
    cuts = [{"shards": [0], "offsets": [[0] * dims], "lengths": [size]} for dims, size in ((2, [3, 4]), (1, [4]))]
    tensors = [["box.weight", "float32", [3, 4], 0], ["box.bias", "float32", [4], 1]]
    return {"format": 1, "shards": 1, "cuts": cuts, "tensors": tensors, **changes}


def test_a_layout_that_is_good_is_believed(directory):
    forge(directory, "layout.json", json.dumps(layout()).encode())
    assert load_box(directory).tree["weight"].tolist() == weights()["weight"].tolist()


def cut(offsets, lengths, shards=None):
    return {
        "cuts": [{"shards": shards or [0] * len(offsets), "offsets": offsets, "lengths": lengths}, layout()["cuts"][1]]
    }


NONSENSE = {
    "a part is missing": cut([[0, 0]], [[2, 4]]),
    "the first row is missing": cut([[1, 0]], [[2, 4]]),
    "parts overlap": cut([[0, 0], [1, 0]], [[2, 4], [2, 4]]),
    "parts overlap, and make the number right": cut([[0, 0], [1, 0]], [[2, 4], [1, 4]]),
    "a part is there twice": cut([[0, 0], [0, 0]], [[3, 4], [3, 4]]),
    "a part stands out": cut([[0, 1]], [[3, 4]]),
    "a part of a negative size": cut([[0, 0], [0, 0]], [[3, 4], [-1, 0]]),
    "an empty part": cut([[0, 0], [0, 0]], [[3, 4], [0, 4]]),
    "a part before the beginning": cut([[-1, 0]], [[3, 4]]),
    "no part": cut([], []),
    "one dimension less": cut([[0]], [[12]]),
    "a file that there is not": cut([[0, 0]], [[3, 4]], [1]),
    "a file of a negative number": cut([[0, 0]], [[3, 4]], [-1]),
    "columns of different lengths": cut([[0, 0]], [[3, 4]], [0, 0]),
    "fractions": cut([[0, 0]], [[3.0, 4.0]]),
    "huge numbers": cut([[0, 0]], [[2**70, 4]]),
    "ragged": cut([[0, 0], [1]], [[1, 4], [2, 4]]),
    "words": cut([["a", "b"]], [[3, 4]]),
    "a negative shape": {"tensors": [["box.weight", "float32", [-3, 4], 0]]},
    "a huge shape": {"tensors": [["box.weight", "float32", [2**40, 2**40], 0]]},
    "a cut that there is not": {"tensors": [["box.weight", "float32", [3, 4], 7]]},
    "a cut from the end": {"tensors": [["box.weight", "float32", [3, 4], -2]]},
    "a tensor twice": {"tensors": [["box.weight", "float32", [3, 4], 0]] * 2},
    "no name": {"tensors": [[None, "float32", [3, 4], 0]]},
    "a tensor of too few words": {"tensors": [["box.weight"]]},
    "no tensors": {"tensors": None},
    "no cuts": {"cuts": {}},
    "another format": {"format": 2},
    "true files": {"shards": True},
    "more files than there can be": {"shards": 10**12},
    "more parts than there can be": cut([[i // 4, i % 4] for i in range(70_000)], [[1, 1]] * 70_000),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_layout_of_nonsense_is_damage_though_its_checksum_is_right(directory, kind):
    forge(directory, "layout.json", json.dumps(layout(**NONSENSE[kind])).encode())
    assert damage_found(directory).startswith("layout.json: ")
    with pytest.raises(CheckpointDamaged, match=r"^layout\.json: "):
        StoredState(directory)


@pytest.mark.parametrize("dtype", ["float33", "Tensor", "nn", "__class__"])
def test_a_type_that_torch_does_not_have_is_damage(directory, dtype):
    tensors = [["box.weight", dtype, [3, 4], 0], ["box.bias", "float32", [4], 1]]
    forge(directory, "layout.json", json.dumps(layout(tensors=tensors)).encode())
    assert damage_found(directory).startswith("layout.json: this torch has no type")
    with pytest.raises(CheckpointDamaged, match=r"^layout\.json: this torch has no type"):
        StoredState(directory)


@pytest.mark.parametrize("name", ["layout.json", "state.json"])
@pytest.mark.parametrize("data", [b"", b"[", b"\xff", b"7", b"[]", b"[" * 100_000, b'{"a":' * 100_000, b"null"])
def test_what_is_no_json_or_without_end_is_damage(directory, name, data):
    forge(directory, name, data)
    assert damage_found(directory).startswith(f"{name}: ")


def test_a_deep_manifest_is_damage(directory):
    Path(directory.location, "manifest.json").write_bytes(b"[" * 100_000)
    assert damage_found(directory).startswith("manifest.json: ")


SUMS = {
    "empty": b"",
    "of another format": b"sums 2 1048576\n",
    "without pieces": b"sums 1 0\n",
    "negative pieces": b"sums 1 -5\n",
    "words": b"sums 1 1048576\na b c\n",
    "of a smaller file": b"sums 1 1048576\n10 0 0000000000000000\n",
    "too few sums": b"sums 1 1048576\n{size} 0\n",
    "too many sums": b"sums 1 1048576\n{size} 0 00 00\n",
    "data behind the end": b"sums 1 1048576\n{size} {more} 00\n",
    "data before the beginning": b"sums 1 1048576\n{size} -1 00\n",
    "a long sum": b"sums 1 1048576\n{size} 0 " + b"f" * 17 + b"\n",
    "not ASCII": "sums 1 1048576\n²".encode(),
}


@pytest.mark.parametrize("kind", SUMS)
def test_checksums_of_nonsense_are_damage_though_their_own_checksum_is_right(directory, kind):
    size = shard(directory).stat().st_size
    data = SUMS[kind].replace(b"{size}", str(size).encode()).replace(b"{more}", str(size + 1).encode())
    forge(directory, "shard-00000.sums", data)
    assert damage_found(directory).startswith("shard-00000.sums: ")


def test_a_part_that_is_smaller_than_its_tensor_is_damage(directory):
    """The rows of the checksums are not those of the layout."""
    data = directory.read("shard-00000.sums").decode().splitlines()
    swapped = [data[0], *reversed(data[1:]), ""]
    forge(directory, "shard-00000.sums", "\n".join(swapped).encode())
    assert "shard-00000.distcp" in damage_found(directory)  # whose bytes do not match


def test_rows_that_the_checksums_do_not_have_are_damage(directory):
    size = shard(directory).stat().st_size
    forge(directory, "shard-00000.sums", f"sums 1 {2**30}\n{size} 0 0000000000000000\n".encode())
    assert damage_found(directory).startswith("shard-00000.sums: ")
