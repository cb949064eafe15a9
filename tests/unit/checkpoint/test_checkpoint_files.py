"""Saving and loading in one process: bit for bit, into a new directory, in a form that stock DCP reads."""

import gc
import json
import os
import re
import threading
import tracemalloc

import psutil
import pytest
import torch
from torch.distributed import checkpoint as dcp

from areal_ray.checkpoint import load, read_manifest, save
from areal_ray.checkpoint.format.shard_file import frame
from areal_ray.distributed import RankError, Ranks
from areal_ray.storage import LocalStorage

from .boxes import Box, bits, save_box, shard, weights

pytestmark = pytest.mark.unit

TENSORS = {
    "specials": torch.tensor([float("nan"), -0.0, 0.0, float("inf"), -float("inf"), 1e-45]),
    "other_nan": torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32),
    "bf16": torch.randn(5).bfloat16(),
    "int64": torch.tensor([2**62 + 1, -(2**63)]),
    "scalar": torch.tensor(3.5),
    "double": torch.randn(2, 3, dtype=torch.float64),
    "bool": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
    "transposed": torch.randn(4, 6).t(),
    "part_of_more": torch.randn(1000)[10:13],
}
VALUES = {"step": 7, "lr": 0.1, "name": "größer", "on": True, "none": None, "list": [1, [2.5]], "empty": {}}


def blank(tree):
    """Of the same types, with other values."""
    return {
        k: torch.full_like(v, 1) if torch.is_tensor(v) else blank(v) if isinstance(v, dict) else plain(v)
        for k, v in tree.items()
    }


def plain(value):
    return None if value is None else type(value)()


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    directory = save_box(tmp_path, **TENSORS, values=VALUES)
    box = Box(**blank({**TENSORS, "values": VALUES}))
    targets = {name: box.tree[name] for name in TENSORS}
    load(directory, {"box": box}, Ranks())
    assert {name: bits(tensor) for name, tensor in targets.items()} == {n: bits(t) for n, t in TENSORS.items()}
    assert box.tree["values"] == VALUES
    assert {name: type(value) for name, value in box.tree["values"].items()} == {n: type(v) for n, v in VALUES.items()}


def test_tensors_are_filled_in_place(tmp_path):
    directory = save_box(tmp_path)
    box = Box(**blank(weights()))
    target = box.tree["weight"]
    load(directory, {"box": box}, Ranks())
    assert box.tree["weight"] is target
    assert torch.equal(target, weights()["weight"])


def test_several_objects_are_told_apart_by_name(tmp_path):
    directory = LocalStorage(tmp_path / "new")
    save(directory, {"a": Box(w=torch.ones(2), n=1), "b": Box(w=torch.zeros(2), n=2)}, {}, Ranks())
    a, b = Box(w=torch.empty(2), n=0), Box(w=torch.empty(2), n=0)
    load(directory, {"b": b, "a": a}, Ranks())
    assert (a.tree["w"].tolist(), a.tree["n"]) == ([1.0, 1.0], 1)
    assert (b.tree["w"].tolist(), b.tree["n"]) == ([0.0, 0.0], 2)


def test_state_without_tensors_makes_the_round_trip(tmp_path):
    box = Box(n=0)
    load(save_box(tmp_path, n=7), {"box": box}, Ranks())
    assert box.tree == {"n": 7}


def test_a_small_view_of_a_large_tensor_is_saved_small(tmp_path):
    directory = save_box(tmp_path, part=torch.zeros(1_000_000)[:3])
    assert shard(directory).stat().st_size < 10_000


def test_the_manifest_sums_every_file_and_says_what_it_was_told(tmp_path):
    directory = save_box(tmp_path, step=12, attempt=3)
    manifest = read_manifest(directory)
    assert manifest.info == {"step": 12, "attempt": 3}
    assert sorted(manifest.files) == [
        ".metadata",
        "layout.json",
        "shard-00000.distcp",
        "shard-00000.sums",
        "state.json",
    ]
    assert directory.names() == sorted([*manifest.files, "manifest.json"])
    assert {name: record.size for name, record in manifest.files.items()} == {
        name: directory.size(name) for name in manifest.files
    }
    assert manifest.total_bytes == sum(directory.size(name) for name in manifest.files)


def test_the_manifest_is_made_last_and_each_file_durable_before_the_next(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    directory = save_box(tmp_path)
    inside = [os.path.basename(path) for path in synced if os.path.dirname(path) == directory.location]
    files = [re.sub(r"\.\d+\.tmp$", "", name) for name in inside]  # the manifest is renamed when it is whole
    assert files[0] == "shard-00000.distcp"
    assert files[-1] == "manifest.json"
    assert sorted(files) == directory.names()


def test_a_directory_that_exists_is_refused_though_it_is_empty(tmp_path):
    (tmp_path / "step-00000001.a1").mkdir()
    with pytest.raises(RankError, match="FileExistsError"):
        save_box(tmp_path)
    assert list((tmp_path / "step-00000001.a1").iterdir()) == []


def test_a_directory_is_used_once(tmp_path):
    directory = save_box(tmp_path)
    before = {name: directory.read(name) for name in directory.names()}
    with pytest.raises(RankError, match="FileExistsError") as caught:
        save_box(tmp_path, other=torch.zeros(3))
    assert caught.value.only(FileExistsError)
    assert {name: directory.read(name) for name in directory.names()} == before


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_dcp_reads_it(tmp_path):
    directory = save_box(tmp_path, **TENSORS)
    state = {f"box.{name}": torch.full_like(tensor, 1) for name, tensor in TENSORS.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory.location), no_dist=True)
    assert {name: bits(tensor) for name, tensor in state.items()} == {f"box.{n}": bits(t) for n, t in TENSORS.items()}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda tree: tree.pop("weight"), "unknown here: box.weight"),
        (lambda tree: tree.update(more=torch.zeros(2)), "missing in it: box.more"),
        (lambda tree: tree.update(weight=torch.zeros(4, 3)), r"box.weight is \(3, 4\) in it and \(4, 3\) here"),
        (lambda tree: tree.update(bias=torch.zeros(4, 1)), r"box.bias is \(4,\) in it and \(4, 1\) here"),
    ],
    ids=["unexpected", "missing", "another shape", "another rank"],
)
def test_a_checkpoint_of_something_else_is_refused_and_nothing_is_filled(tmp_path, change, part):
    directory = save_box(tmp_path)
    tree = blank(weights())
    change(tree)
    before = {name: tensor.clone() for name, tensor in tree.items()}
    with pytest.raises(ValueError, match=part):
        load(directory, {"box": Box(**tree)}, Ranks())
    assert all(torch.equal(tree[name], before[name]) for name in before)


def test_all_that_does_not_fit_is_told_but_not_without_end(tmp_path):
    directory = save_box(tmp_path, **{f"w{i:02}": torch.zeros(1) for i in range(20)})
    with pytest.raises(ValueError, match=r"w00.*w01.*w07 and 12 more"):
        load(directory, {"box": Box()}, Ranks())


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, {"a": (1,)}, object(), b"bytes", {1, 2}])
def test_state_that_json_does_not_keep_is_refused_when_it_is_saved(tmp_path, value):
    with pytest.raises(TypeError):
        save_box(tmp_path, weight=torch.zeros(1), value=value)
    assert not (tmp_path / "step-00000001.a1" / "manifest.json").exists()


def test_a_loss_that_is_not_a_number_can_be_saved(tmp_path):
    box = Box(loss=0.0)
    load(save_box(tmp_path, loss=float("nan")), {"box": box}, Ranks())
    assert box.tree["loss"] != box.tree["loss"]


def test_plain_values_are_readable_json(tmp_path):
    assert json.loads(save_box(tmp_path, **weights(), count=7).read("state.json")) == {"box": {"count": 7}}


@pytest.mark.parametrize("fails", [False, True])
def test_a_save_leaves_no_thread_no_process_and_no_memory_behind(tmp_path, monkeypatch, fails):
    def held():
        # Of tests before this one some may be about to go.
        return set(os.listdir("/proc/self/fd")), set(threading.enumerate()), set(psutil.Process().children())

    def full(*_):
        raise OSError(28, "No space left on device")

    before = held()
    if fails:
        monkeypatch.setattr(LocalStorage, "create", full)
        with pytest.raises(RankError, match="No space left"):
            save_box(tmp_path)
    else:
        save_box(tmp_path)
    gc.collect()  # the error of a failed save holds on to its memory
    assert [now - then for now, then in zip(held(), before, strict=True)] == [set(), set(), set()]


@pytest.mark.parametrize(("shape", "dtype"), [((3, 4), torch.float32), ((), torch.int64), ((0, 3), torch.bfloat16)])
def test_what_stands_around_a_tensor_is_as_torch_writes_it(tmp_path, shape, dtype):
    tensor = torch.ones(shape, dtype=dtype)
    torch.serialization.set_crc32_options(False)
    torch.save(tensor, tmp_path / "archive")  # the name of a file without its ending is that of the archive in it
    torch.serialization.set_crc32_options(True)
    before, after = frame(shape, dtype)
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert before + data + after == (tmp_path / "archive").read_bytes()


def test_the_frame_of_a_large_tensor_takes_no_room_for_its_data():
    tracemalloc.start()
    frame((10**8,), torch.float32)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6
