"""Loading distrusts: every kind of damage is found before anything is used, and hostile files are not obeyed."""

import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
import xxhash
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from areal_ray.checkpoint import Catalog, CheckpointDamaged, Manifest, load, read_manifest
from areal_ray.checkpoint.dcp_metadata import decode_metadata
from areal_ray.checkpoint.manifest import verify
from areal_ray.distributed import RankError, Ranks
from areal_ray.storage import LocalStorage

from .boxes import DAMAGE, Box, do_damage, forge, save_box, shard, weights

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


def test_a_shard_of_another_save_is_damage(directory, tmp_path):
    other = save_box(tmp_path, step=2, **weights(2.0))
    shard(directory).write_bytes(shard(other).read_bytes())
    assert damage_found(directory).startswith("shard-00000.distcp: ")


def test_a_manifest_of_a_later_format_is_refused(directory):
    manifest = read_manifest(directory)
    data = Manifest(manifest.info, manifest.files, format=2).encode()
    Path(directory.location, "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointDamaged, match="format 2"):
        read_manifest(directory)


def test_a_shard_without_checksums_in_the_manifest_is_not_read(directory):
    forge(directory, "shard-00000.distcp", shard(directory).read_bytes())  # a record of the whole, none of its parts
    assert "no checksum for the bytes" in damage_found(directory)


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname"])
def test_a_manifest_that_names_a_file_outside_is_damage(directory, tmp_path, name):
    manifest = read_manifest(directory)
    files = {**manifest.files, name: manifest.files["state.json"]}
    Path(directory.location, "manifest.json").write_bytes(Manifest(manifest.info, files).encode())
    with pytest.raises(CheckpointDamaged, match=r"outside|hostname"):
        verify(directory)
    (entry,) = Catalog(LocalStorage(tmp_path)).entries()
    assert entry.problem is not None


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["whole", "state_dict_metadata", "planner_data", "storage_data"])
def test_a_hostile_pickle_is_refused_and_not_executed_though_its_checksum_is_right(directory, tmp_path, where):
    evil = Evil(str(tmp_path / "executed"))
    parts = {"state_dict_metadata": {}, "planner_data": None, "storage_data": {}}
    forged = evil if where == "whole" else Metadata(**{**parts, where: {"box": evil}})
    forge(directory, ".metadata", pickle.dumps(forged))
    verify(directory)  # nothing is wrong with the bytes
    assert damage_found(directory) == ".metadata: refused, it wants to load posix.mkdir"
    assert not (tmp_path / "executed").exists()


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name_of(module, name):
    return text(module) + text(name) + b"\x93"


def call(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def test_a_pickle_that_reaches_code_through_the_attributes_of_an_allowed_name_is_refused(directory, tmp_path):
    """`torch.float32.__class__.__base__.__subclasses__` begins like the name of a type, and leads to all of Python."""
    index = next(i for i, cls in enumerate(object.__subclasses__()) if cls.__name__ == "_wrap_close")  # of module os
    attribute = name_of("torch", "float32.__class__.__base__.__getattribute__")
    class_attribute = name_of("torch", "float32.__class__.__class__.__getattribute__")
    classes = call(name_of("torch", "float32.__class__.__base__.__subclasses__"))
    cls = call(call(attribute, classes, text("__getitem__")), b"J" + struct.pack("<i", index))
    variables = call(attribute, call(class_attribute, cls, text("__init__")), text("__globals__"))
    mkdir = call(call(attribute, variables, text("__getitem__")), text("mkdir"))
    forge(directory, ".metadata", b"\x80\x04" + call(mkdir, text(str(tmp_path / "executed"))) + b".")
    assert damage_found(directory).startswith(".metadata: ")
    assert not (tmp_path / "executed").exists()


def test_an_attribute_of_an_allowed_name_is_refused():
    with pytest.raises(CheckpointDamaged, match=r"refused, it wants to load torch\.float32\.__class__"):
        decode_metadata(b"\x80\x04" + name_of("torch", "float32.__class__") + b".")


def test_metadata_of_pickled_objects_is_refused(directory):
    forge(directory, ".metadata", pickle.dumps(Metadata({"box.weight": BytesStorageMetadata()}, storage_data={})))
    assert damage_found(directory).startswith(".metadata: 'box.weight' is a pickled object")


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps(None)])
def test_metadata_that_is_none_is_refused(directory, data):
    forge(directory, ".metadata", data)
    assert damage_found(directory).startswith(".metadata: ")


def test_a_hostile_pickle_in_the_shard_is_not_executed_though_its_checksums_are_right(tmp_path):
    directory = save_box(tmp_path, weight=torch.zeros(3))
    data = pickle.dumps(Evil(str(tmp_path / "executed")), protocol=2)
    forge(directory, "shard-00000.distcp", data, chunks=[[0, len(data), xxhash.xxh3_64_hexdigest(data)]])
    verify(directory)
    with pytest.raises(RankError):
        load(directory, {"box": Box(weight=torch.zeros(3))}, Ranks())
    assert not (tmp_path / "executed").exists()
