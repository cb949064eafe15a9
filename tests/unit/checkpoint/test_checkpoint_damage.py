"""Loading distrusts: every kind of damage is found before anything is used, and hostile files are not obeyed."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from areal_ray.checkpoint import Catalog, CheckpointDamaged, Manifest, StoredState, load, read_manifest
from areal_ray.checkpoint.format.format_1 import decode_metadata
from areal_ray.checkpoint.format.manifest import verify
from areal_ray.distributed import RankError, Ranks
from areal_ray.storage import LocalStorage

from .boxes import DAMAGE, OF_FORMAT_1, Box, do_damage, flip, forge, of_format_1, save_box, shard, weights

pytestmark = pytest.mark.unit

SIZES_TELL = [kind for kind, (_, _, sizes_tell) in DAMAGE.items() if sizes_tell]


def load_box(directory):
    box = Box(**{name: torch.zeros_like(tensor) for name, tensor in weights().items()}, count=0)
    load(directory, {"box": box}, Ranks())
    return box


def damage_found(directory):
    """What loading says of a damaged checkpoint."""
    with pytest.raises(RankError) as caught:
        load_box(directory)
    assert caught.value.only(CheckpointDamaged)
    return str(caught.value).partition("CheckpointDamaged: ")[2]


@pytest.fixture
def directory(tmp_path):
    return save_box(tmp_path, **weights(), count=7)


def test_without_damage_it_loads_and_verifies(directory):
    assert load_box(directory).tree["count"] == 7
    assert verify(directory) == read_manifest(directory)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_on_loading_and_the_file_named(directory, kind):
    name = do_damage(directory, kind)
    assert damage_found(directory).startswith(f"{name}: ")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_by_verifying_and_the_file_named(directory, kind):
    name = do_damage(directory, kind)
    with pytest.raises(CheckpointDamaged, match=f"^{name}: "):
        verify(directory)


@pytest.mark.parametrize("kind", SIZES_TELL)
def test_damage_that_sizes_tell_is_found_by_the_catalog_and_the_file_named(directory, tmp_path, kind):
    name = do_damage(directory, kind)
    (entry,) = Catalog(LocalStorage(tmp_path)).entries()
    assert entry.manifest is None
    assert entry.problem.startswith(f"{name}: ")


def test_every_byte_of_the_manifest_counts(directory):
    path = Path(directory.location, "manifest.json")
    whole = path.read_bytes()
    for i in range(0, len(whole), 7):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(CheckpointDamaged):
            read_manifest(directory)


@pytest.mark.parametrize("damage", [os.remove, lambda path: flip(path, 50)])
def test_what_is_there_for_others_does_not_keep_us_from_loading_but_is_found_by_verifying(directory, damage):
    damage(Path(directory.location, ".metadata"))
    assert load_box(directory).tree["count"] == 7
    with pytest.raises(CheckpointDamaged, match=r"^\.metadata: "):
        verify(directory)


def test_a_shard_of_another_save_is_damage(directory, tmp_path):
    other = save_box(tmp_path, step=2, **weights(2.0))
    shard(directory).write_bytes(shard(other).read_bytes())
    assert damage_found(directory).startswith("shard-00000.distcp: ")


def test_a_manifest_of_a_later_format_is_refused(directory):
    manifest = read_manifest(directory)
    data = Manifest(manifest.info, manifest.files, format=3).encode()
    Path(directory.location, "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointDamaged, match="format 3"):
        read_manifest(directory)


@pytest.mark.parametrize("name", ["shard-00000.distcp", "shard-00000.sums", "layout.json", "state.json"])
def test_a_file_that_the_manifest_does_not_have_is_not_read(directory, name):
    manifest = read_manifest(directory)
    files = {key: record for key, record in manifest.files.items() if key != name}
    Path(directory.location, "manifest.json").write_bytes(Manifest(manifest.info, files).encode())
    assert damage_found(directory) == f"{name}: not in the manifest"


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname"])
def test_a_manifest_that_names_a_file_outside_is_damage(directory, tmp_path, name):
    manifest = read_manifest(directory)
    files = {**manifest.files, name: manifest.files["state.json"]}
    Path(directory.location, "manifest.json").write_bytes(Manifest(manifest.info, files).encode())
    with pytest.raises(CheckpointDamaged, match=r"outside|hostname"):
        verify(directory)
    (entry,) = Catalog(LocalStorage(tmp_path)).entries()
    assert entry.problem is not None


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


@pytest.fixture
def old(tmp_path):
    return of_format_1(tmp_path)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["whole", "state_dict_metadata", "planner_data", "storage_data"])
def test_a_hostile_pickle_is_refused_and_not_executed_though_its_checksum_is_right(old, tmp_path, where):
    evil = Evil(str(tmp_path / "executed"))
    parts = {"state_dict_metadata": {}, "planner_data": None, "storage_data": {}}
    forged = evil if where == "whole" else Metadata(**{**parts, where: {"box": evil}})
    forge(old, ".metadata", pickle.dumps(forged))
    verify(old)  # nothing is wrong with the bytes
    assert damage_found(old) == ".metadata: refused, it wants to load posix.mkdir"
    assert not (tmp_path / "executed").exists()


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name_of(module, name):
    return text(module) + text(name) + b"\x93"


def call(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def test_a_pickle_that_reaches_code_through_the_attributes_of_an_allowed_name_is_refused(old, tmp_path):
    """`torch.float32.__class__.__base__.__subclasses__` begins like the name of a type, and leads to all of Python."""
    index = next(i for i, cls in enumerate(object.__subclasses__()) if cls.__name__ == "_wrap_close")  # of module os
    attribute = name_of("torch", "float32.__class__.__base__.__getattribute__")
    class_attribute = name_of("torch", "float32.__class__.__class__.__getattribute__")
    classes = call(name_of("torch", "float32.__class__.__base__.__subclasses__"))
    cls = call(call(attribute, classes, text("__getitem__")), b"J" + struct.pack("<i", index))
    variables = call(attribute, call(class_attribute, cls, text("__init__")), text("__globals__"))
    mkdir = call(call(attribute, variables, text("__getitem__")), text("mkdir"))
    forge(old, ".metadata", b"\x80\x04" + call(mkdir, text(str(tmp_path / "executed"))) + b".")
    assert damage_found(old).startswith(".metadata: ")
    assert not (tmp_path / "executed").exists()


def test_an_attribute_of_an_allowed_name_is_refused():
    with pytest.raises(CheckpointDamaged, match=r"refused, it wants to load torch\.float32\.__class__"):
        decode_metadata(b"\x80\x04" + name_of("torch", "float32.__class__") + b".")


def test_metadata_of_pickled_objects_is_refused(old):
    forge(old, ".metadata", pickle.dumps(Metadata({"box.weight": BytesStorageMetadata()}, storage_data={})))
    assert damage_found(old).startswith(".metadata: 'box.weight' is a pickled object")


DEEP = {
    "a deep tuple": b"\x80\x04)" + b"\x85" * 1_000_000 + b".",
    "a deep tuple of pairs": b"\x80\x04)" + b"N\x86" * 1000 + b".",
    "deep lists": b"\x80\x04" + b"]" * 1000 + b"a" * 999 + b".",
    "pairs of one pair": b"\x80\x04)\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60)) + b".",
    "a persistent object": b"\x80\x04N" + b"Q.",
    "an extension": b"\x80\x04\x82\x01.",
    "a stack without its mark": b"\x80\x04Nt.",
}


@pytest.mark.parametrize("kind", DEEP)
def test_a_pickle_that_would_crash_or_never_end_is_refused_at_once(old, kind):
    """In a process of its own: what it is about ends one."""
    forge(old, ".metadata", DEEP[kind])
    code = "import sys; from areal_ray.cli.main import main; sys.exit(main(['ckpt', *sys.argv[1:]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "digest", old.location], timeout=60, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert ".metadata: " in done.stderr
    assert "Traceback" not in done.stderr
    assert damage_found(old).startswith(".metadata: ")


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps(None)])
def test_metadata_that_is_none_is_refused(old, data):
    forge(old, ".metadata", data)
    assert damage_found(old).startswith(".metadata: ")


def test_a_hostile_pickle_in_the_shard_is_not_executed_though_its_checksums_are_right(old, tmp_path):
    data = pickle.dumps(Evil(str(tmp_path / "executed")), protocol=2)
    size = 1577  # of each part in it
    data += bytes(size - len(data))
    sums = [[i * size, size, xxhash.xxh3_64_hexdigest(data)] for i in range(3)]
    forge(old, "shard-00000.distcp", data * 3, chunks=sums)
    verify(old)
    with pytest.raises(RankError, match="no tensor"):
        load(old, {"box": Box(**OF_FORMAT_1)}, Ranks())
    assert not (tmp_path / "executed").exists()


def test_bytes_that_are_no_tensor_are_not_executed_whatever_they_are(tmp_path):
    directory = save_box(tmp_path, weight=torch.zeros(100))
    data = pickle.dumps(Evil(str(tmp_path / "executed")), protocol=2)
    size = shard(directory).stat().st_size
    data += bytes(size - len(data))
    forge(directory, "shard-00000.distcp", data)
    before = directory.read("shard-00000.sums").split()[4].decode()
    forge(
        directory, "shard-00000.sums", f"sums 1 {1 << 20}\n{size} {before} {xxhash.xxh3_64_hexdigest(data)}\n".encode()
    )
    verify(directory)
    box = Box(weight=torch.ones(100))
    load(directory, {"box": box}, Ranks())
    assert box.tree["weight"].view(torch.uint8).numpy().tobytes() == data[int(before) :][:400]  # what is stored there
    assert not (tmp_path / "executed").exists()
