"""Pickles, of which checkpoints of format 1 have some, and what looks like one: nothing in them is obeyed."""

import os
import pickle
import struct
import subprocess
import sys

import pytest
import torch
import xxhash
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from areal_ray.checkpoint import CheckpointDamaged, StoredState, load
from areal_ray.checkpoint.format.format_1 import decode_metadata
from areal_ray.checkpoint.format.manifest import verify
from areal_ray.distributed import RankError, Ranks

from .boxes import OF_FORMAT_1, Box, damage_found, forge, of_format_1, save_box, shard

pytestmark = pytest.mark.unit


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


@pytest.mark.parametrize("name", [7, None, ("box", "weight"), b"box.weight"])
def test_names_of_tensors_that_are_no_text_are_refused(old, name):
    metadata = decode_metadata(old.read(".metadata"))
    some = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = metadata.state_dict_metadata[some]
    forge(old, ".metadata", pickle.dumps(metadata))
    assert damage_found(old) == f".metadata: {name!r} is no name of a tensor"
    with pytest.raises(CheckpointDamaged, match="is no name of a tensor"):
        StoredState(old)


def test_what_is_said_of_damage_is_one_line_whatever_a_library_says(old):
    forge(old, ".metadata", b"\x80\x04" + b"X\x04\x00\x00\x00a\n\nb" + b"Q.")
    assert "\n" not in damage_found(old)
    assert str(CheckpointDamaged("a\n  b\tc")) == "a b c"


PAIRS = b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60))
DEEP = {  # keys of a dict: Python looks at all of a key when it puts it in
    "a deep tuple": b"\x80\x04})" + b"\x85" * 1_000_000 + b"Ns.",
    "a deep tuple of pairs": b"\x80\x04}" + b"N" * 100_000 + b")" + b"\x86" * 100_000 + b"Ns.",
    "deep lists": b"\x80\x04" + b"]" * 1000 + b"a" * 999 + b".",
    "pairs of one pair": b"\x80\x04}" + PAIRS + b"Ns.",
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
