"""Small checkpoints for the tests: a Stateful that is nothing but a tree, and ways to damage what it is saved as."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import xxhash

from areal_ray.checkpoint import Catalog, CheckpointDamaged, Manifest, load, read_manifest, save
from areal_ray.checkpoint.format.manifest import FileRecord
from areal_ray.distributed import RankError, Ranks
from areal_ray.storage import LocalStorage


class Box:
    """Holds a tree of tensors and plain values."""

    def __init__(self, **tree):
        self.tree = tree

    def state_dict(self):
        return self.tree

    def load_state_dict(self, state):
        self.tree = state


def weights(value=1.0):
    return {"weight": torch.full((3, 4), value), "bias": torch.arange(4.0)}


def save_box(run, step=1, attempt=1, **tree):
    """A checkpoint of a tree (by default `weights`) in the run directory; its Storage."""
    directory = LocalStorage(run).sub(Catalog.name(step, attempt))
    save(directory, {"box": Box(**(tree or weights()))}, {"step": step, "attempt": attempt}, Ranks())
    return directory


def bits(tensor):
    """Type, shape and bytes: NaN equals itself and -0.0 is not 0.0."""
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def shard(directory):
    return Path(directory.location, "shard-00000.distcp")


def flip(path, offset):
    """Change one bit."""
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def cut(path, keep):
    """Truncate to a share of the size."""
    os.truncate(path, int(path.stat().st_size * keep))


def forge(directory, name, data, chunks=()):
    """Put other bytes in the place of a file and recompute every checksum of the manifest for them."""
    Path(directory.location, name).write_bytes(data)
    manifest = read_manifest(directory)
    files = {**manifest.files, name: FileRecord(len(data), xxhash.xxh3_128_hexdigest(data), list(chunks))}
    Path(directory.location, "manifest.json").write_bytes(Manifest(manifest.info, files, manifest.format).encode())


def of_format_1(run):
    """A copy of a checkpoint as they were written before format 2, by two ranks; its Storage."""
    shutil.copytree(Path(__file__).parent / "format_1", run, dirs_exist_ok=True)
    return LocalStorage(run).sub("step-00000001.a1")


OF_FORMAT_1 = {
    "rows": torch.arange(20.0).reshape(5, 4),
    "columns": torch.arange(10.0).reshape(2, 5).bfloat16(),
    "replicated": torch.arange(6).reshape(2, 3),
    "one": torch.tensor([7.0]),
    "bias": torch.arange(4.0),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
}  # and count: 7


# What can happen to a checkpoint: the file that must be named, what is done to it, and whether sizes tell.
DAMAGE = {
    "first bit of the shard": ("shard-00000.distcp", lambda path: flip(path, 0), False),
    "bit in the middle of the shard": ("shard-00000.distcp", lambda path: flip(path, path.stat().st_size // 2), False),
    "last bit of the shard": ("shard-00000.distcp", lambda path: flip(path, -1), False),
    "shard cut short": ("shard-00000.distcp", lambda path: cut(path, 0.7), True),
    "shard lost its last byte": ("shard-00000.distcp", lambda path: os.truncate(path, path.stat().st_size - 1), True),
    "shard deleted": ("shard-00000.distcp", os.remove, True),
    "checksums deleted": ("shard-00000.sums", os.remove, True),
    "bit in the checksums": ("shard-00000.sums", lambda path: flip(path, 20), False),
    "layout deleted": ("layout.json", os.remove, True),
    "bit in the layout": ("layout.json", lambda path: flip(path, 50), False),
    "state deleted": ("state.json", os.remove, True),
    "bit in the state": ("state.json", lambda path: flip(path, 0), False),
    "manifest torn": ("manifest.json", lambda path: cut(path, 0.5), True),
    "manifest emptied": ("manifest.json", lambda path: cut(path, 0), True),
    "bit in the manifest": ("manifest.json", lambda path: flip(path, 60), True),
    "manifest not UTF-8": ("manifest.json", lambda path: path.write_bytes(b'{"\xff'), True),
    "manifest deleted": ("manifest.json", os.remove, True),
}


def do_damage(directory, kind):
    """The name of the file that was damaged."""
    name, work, _ = DAMAGE[kind]
    work(Path(directory.location, name))
    return name


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
