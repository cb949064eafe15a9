"""`.metadata` without torch: equal to what DCP's own classes would be. That `dcp.load` reads it is shown elsewhere."""

import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from areal_ray.processes.dcp_pickle import MetadataParts, encode

pytestmark = pytest.mark.unit

ROWS = [([0, 0], [2, 4]), ([2, 0], [1, 4])]
WHOLE = [([], [])]
HUGE = [([0], [2**33]), ([2**33], [2**40])]
FILES = ["shard-00000.distcp", "größer"]
TENSORS = {
    "a.weight": (torch.float32, (3, 4), ROWS, [1, 0]),
    "a.again": (torch.bfloat16, (3, 4), ROWS, [1, 0]),
    "ünïcode \U0001f600": (torch.int64, (), WHOLE, [1]),
    "empty": (torch.bool, (0, 3), [], []),
    "huge": (torch.float8_e4m3fn, (2**33 + 2**40,), HUGE, [0, 1]),
}
PLACES = [(0, 10), (2**33, 20), (5, 2**31), (2**31 - 1, 7), (1, 1), (2**62, 3), (4, 4)]


def cut(boxes, shards):
    dims = len(boxes[0][0]) if boxes else 2
    return np.array(boxes, np.int64).reshape(len(boxes), 2, dims), np.array(shards, np.int64)


def parts(tensors):
    return MetadataParts(
        [(name, str(dtype)[6:], shape, i) for i, (name, (dtype, shape, *_)) in enumerate(tensors.items())],
        [cut(boxes, shards) for *_, boxes, shards in tensors.values()],
        FILES,
        *map(np.array, zip(*PLACES, strict=True)),
    )


def expected(tensors):
    places, entries, stored = iter(PLACES), {}, {}
    for name, (dtype, shape, boxes, shards) in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(length)) for offset, length in boxes]
        entries[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks)
        for i, ((offset, _), shard) in enumerate(zip(boxes, shards, strict=True)):
            stored[MetadataIndex(name, offset, i)] = _StorageInfo(FILES[shard], *next(places))
    return Metadata(entries, storage_data=stored, storage_meta=StorageMeta())


def test_it_is_what_torch_would_pickle():
    found, should = pickle.loads(encode(parts(TENSORS))), expected(TENSORS)  # noqa: S301
    assert found == should
    assert [key.index for key in found.storage_data] == [key.index for key in should.storage_data]
    assert repr(found) == repr(should)  # types of all values, too


def test_the_paths_of_tensors_are_what_a_planner_keeps():
    paths = {name: tuple(name.split(".")) for name in TENSORS}
    found = pickle.loads(encode(replace(parts(TENSORS), paths=paths)))  # noqa: S301
    assert (found.planner_data, found.state_dict_metadata) == (paths, expected(TENSORS).state_dict_metadata)


def test_of_no_tensors():
    assert pickle.loads(encode(MetadataParts([], [], [], np.zeros(0), np.zeros(0)))) == expected({})  # noqa: S301


def test_it_needs_no_torch_and_little_for_each_part():
    code = """
import sys
from dataclasses import replace
import numpy as np
from areal_ray.processes.dcp_pickle import MetadataParts, encode
ranks, tensors = 200, 100
boxes = np.stack([np.stack([np.arange(ranks), np.zeros(ranks)], 1), np.ones((ranks, 2))], 1).astype(int)
names = [(f"t{i}", "float32", (ranks, 1), 0) for i in range(tensors)]
places = np.arange(ranks * tensors)
print(len(encode(MetadataParts(names, [(boxes, np.arange(ranks))], ["x"] * ranks, places, places))))
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 100 * 200 * 100
