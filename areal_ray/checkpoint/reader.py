"""Loading: no byte is used before its checksum is verified."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint.dcp_metadata import decode_metadata
from areal_ray.checkpoint.manifest import METADATA, STATE, CheckpointDamaged, Manifest, read_checked, read_manifest
from areal_ray.checkpoint.read_lock import read_lock
from areal_ray.checkpoint.tree import flatten, merge
from areal_ray.distributed import Ranks
from areal_ray.distributed.device import Uploads
from areal_ray.storage import Storage, read_ahead

_READ_BYTES = 16 << 20  # of neighbouring chunks that are read in one piece
_PART_BYTES = 4 << 20  # of tensors that are read ahead in one go, and take three times as much while they are
Checksums = dict[tuple[str, int], tuple[int, str]]  # length and checksum of the chunk at an offset of a file


def load(directory: Storage, state: Mapping[str, Stateful], ranks: Ranks, part: bool = False) -> Manifest:
    """Bring objects to the state that a checkpoint holds, at any world size and mesh. A collective.

    Args:
        directory: a committed checkpoint.
        state: the objects, by the names under which they were saved. Tensors are filled in place. One that has a
            method `expect` is told first which of its tensors the checkpoint has.
        ranks: all ranks of the job.
        part: let the checkpoint hold more than the objects have; what is left over is not read.

    Raises:
        RankError: on every rank, if the checkpoint is damaged anywhere (each rank checks what it reads).
        ValueError: if it holds other tensors, or of other shapes, than the objects have.
    """
    with read_lock(directory) if ranks.rank == 0 else nullcontext():
        return _load(directory, state, ranks, part)


def _load(directory: Storage, state: Mapping[str, Stateful], ranks: Ranks, part: bool) -> Manifest:
    ranks.agree(True)  # nobody reads the manifest before rank 0 has said that it is being read

    def read_small_files() -> tuple[Manifest, Metadata, dict[str, Any]]:
        manifest = read_manifest(directory)
        metadata = decode_metadata(read_checked(directory, METADATA, manifest))
        return manifest, metadata, json.loads(read_checked(directory, STATE, manifest))

    manifest, metadata, values = ranks.all_or_raise(read_small_files)
    for name, each in state.items():
        if expect := getattr(each, "expect", None):
            expect({key.removeprefix(f"{name}.") for key in metadata.state_dict_metadata if key.startswith(f"{name}.")})
    trees = {name: each.state_dict() for name, each in state.items()}
    tensors, _ = flatten(trees)
    _check_keys(tensors, metadata, directory.location, part)
    ranks.all_or_raise(lambda: _read_tensors(directory, manifest, metadata, tensors, _checksums(manifest)))
    for name, each in state.items():
        each.load_state_dict(merge(trees[name], values.get(name, {})))
    return manifest


def _checksums(manifest: Manifest) -> Checksums:
    return {
        (name, offset): (length, digest)
        for name, record in manifest.files.items()
        for offset, length, digest in record.chunks
    }


def _read_tensors(
    directory: Storage, manifest: Manifest, metadata: Metadata, tensors: Mapping[str, torch.Tensor], sums: Checksums
) -> None:
    """Fill tensors in place: DCP plans which chunks this rank needs, each is verified before it is decoded.

    No collective: a load plan needs nobody else's, and DCP's own `dcp.load` would wrap the error of a failing rank.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=False)
    plan = planner.finish_plan(planner.create_local_plan())
    uploads = Uploads()
    wanted: dict[str, dict[int, list[ReadItem]]] = {}
    for item in plan.items:
        where = metadata.storage_data[item.storage_index]
        wanted.setdefault(where.relative_path, {}).setdefault(where.offset, []).append(item)
    for name, items_at in wanted.items():
        if name not in manifest.files:
            raise CheckpointDamaged(f"{name}: not in the manifest")
        if unknown := [offset for offset in items_at if (name, offset) not in sums]:
            raise CheckpointDamaged(f"{name}: no checksum for the bytes at {unknown[0]}")
        chunks = [(offset, *sums[name, offset]) for offset in sorted(items_at)]
        for offset, tensor in _read_chunks(directory, name, chunks):
            for item in items_at[offset]:
                part = tensor
                for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    part = part.narrow(dim, start, length)
                target = planner.resolve_tensor(item).detach()
                uploads.copy(target, part)
                planner.commit_tensor(item, target)
    uploads.wait()


def _read_chunks(
    directory: Storage, name: str, chunks: list[tuple[int, int, str]]
) -> Iterator[tuple[int, torch.Tensor]]:
    """The tensors at (offset, length, checksum), each verified. Neighbours are read in one piece: on object storage
    every read is a request."""
    try:
        file = directory.open(name)
    except FileNotFoundError:
        raise CheckpointDamaged(f"{name}: missing") from None
    with file:
        while chunks:
            start, end, count = chunks[0][0], chunks[0][0] + chunks[0][1], 1
            while count < len(chunks) and chunks[count][0] == end and end + chunks[count][1] - start <= _READ_BYTES:
                end += chunks[count][1]
                count += 1
            file.seek(start)
            try:
                data = memoryview(file.read(end - start))
            except FileNotFoundError:  # on object storage an open file can be deleted
                raise CheckpointDamaged(f"{name}: missing") from None
            if len(data) != end - start:
                raise CheckpointDamaged(f"{name}: ends after {start + len(data)} bytes, should have {end}")
            for offset, length, digest in chunks[:count]:
                yield offset, _decode(data[offset - start : offset - start + length], name, offset, digest)
            chunks = chunks[count:]


def _decode(data: memoryview, name: str, offset: int, digest: str) -> torch.Tensor:
    if xxhash.xxh3_64_hexdigest(data) != digest:
        raise CheckpointDamaged(f"{name}: the checksum of the bytes at {offset} does not match")
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:  # written so, or the checksum would not match
        raise CheckpointDamaged(f"{name}: the bytes at {offset} are no tensor ({type(error).__name__})") from None
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointDamaged(f"{name}: the bytes at {offset} are a {type(tensor).__name__}, not a tensor")
    return tensor


class StoredState:
    """The contents of a checkpoint, for tools: whole tensors, in one process; needs a `read_lock`.

    Args:
        directory: a committed checkpoint.

    Raises:
        CheckpointDamaged: here and on reading, if the bytes are not those that were written.
    """

    def __init__(self, directory: Storage) -> None:
        self._directory = directory
        self.manifest = read_manifest(directory)
        self._metadata = decode_metadata(read_checked(directory, METADATA, self.manifest))
        self.values: dict[str, Any] = json.loads(read_checked(directory, STATE, self.manifest))
        self.info = self.manifest.info
        self._sums = _checksums(self.manifest)
        self.names = sorted(self._metadata.state_dict_metadata)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._metadata.state_dict_metadata[name].size)  # type: ignore[union-attr]

    def dtype(self, name: str) -> torch.dtype:
        return self._metadata.state_dict_metadata[name].properties.dtype  # type: ignore[union-attr]

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, put together from all shards."""
        return self._read([name])[name]

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors by name, in this order; those that come next are read meanwhile, a bounded number of bytes."""
        for read in read_ahead((3 * size, partial(self._read, part)) for size, part in self._parts(names)):
            yield from read.items()

    def _parts(self, names: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
        """Bytes and names of what is read in one go: small tensors together, as they are neighbours in the shards."""
        part, size = list[str](), 0
        for name in names:
            more = torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize
            if part and size + more > _PART_BYTES:
                yield size, part
                part, size = [], 0
            part.append(name)
            size += more
        if part:
            yield size, part

    def _read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        tensors = {name: torch.empty(self.shape(name), dtype=self.dtype(name)) for name in names}
        _read_tensors(self._directory, self.manifest, self._metadata, tensors, self._sums)
        return tensors


def _check_keys(tensors: Mapping[str, torch.Tensor], metadata: Metadata, location: str, part: bool) -> None:
    """DCP itself ignores what the checkpoint has too much; here both directions are errors."""
    saved = metadata.state_dict_metadata
    problems = [f"missing in it: {name}" for name in sorted(set(tensors) - set(saved))]
    if not part:
        problems += [f"unknown here: {name}" for name in sorted(set(saved) - set(tensors))]
    for name in sorted(set(saved) & set(tensors)):
        entry, tensor = saved[name], tensors[name]
        size = tuple(entry.size)  # type: ignore[union-attr]
        if size != tuple(tensor.shape):
            problems.append(f"{name} is {size} in it and {tuple(tensor.shape)} here")
        elif entry.properties.dtype != tensor.dtype:  # type: ignore[union-attr]
            problems.append(f"{name} is {entry.properties.dtype} in it and {tensor.dtype} here")  # type: ignore[union-attr]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"checkpoint {location} does not fit this model: {'; '.join(problems[:8])}{more}")
