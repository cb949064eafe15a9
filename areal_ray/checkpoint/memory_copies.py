"""Copies of the state in host memory that outlive a killed rank: between two checkpoints, far more often than those.

Each rank copies what it holds itself, into memory that a process beside it keeps (see keeper.py), and the rank that
takes its place on the same machine brings it back. A copy is no checkpoint: it is gone with the machine, with a change
of the number of ranks or of their places, and with the end of the run; then the newest checkpoint is what there is. The
idea is that of Gemini (Wang et al., SOSP 2023) and DLRover's Flash Checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import xxhash
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint.manifest import CheckpointDamaged
from areal_ray.checkpoint.shard_file import ShardImage
from areal_ray.checkpoint.tree import flatten, local, merge, to_json
from areal_ray.distributed import RankError, Ranks
from areal_ray.processes.memory_keeper import MemoryKeeper, claim

_FREE = 0.1  # share of a machine's memory that must be left
_AGAIN = 32  # times that no copy is taken, where there was no room, before it is tried again
_HEAD = struct.Struct("<QQ")  # of a record: its length, xxh3_64
_OFF, _CUT, _WHOLE = range(3)  # how a rank stands: it cannot copy; its last copy cannot be used; it can
Version = tuple[int, int]  # (attempt, step), by which copies and checkpoints are ordered


@dataclass(frozen=True)
class Copy:
    """What was brought back from memory.

    Args:
        version: (attempt, step) at which it was taken.
        values: plain values of the state, by object, as state.json would hold them.
        info: about the run that took it.
    """

    version: Version
    values: dict[str, Any]
    info: dict[str, Any]


class MemoryCopies:
    """Two copies in turn: from the first one on, one is whole at any moment, the same one on all ranks.

    A copy counts when its record, written last, is there. All ranks wait for each other's records before the older
    copy is overwritten, so that it does not matter when which of them is killed.

    Args:
        name: unique to this submission of the run.
        ranks: all ranks of the job.
        owner: process id; what is kept for a successor ends with it. None: nobody's.
        complain: prints a line for the user.
        durable: waits until what was written about the steps so far is durable (OSError: it is not; then the copy does
            not count).
    """

    def __init__(
        self,
        name: str,
        ranks: Ranks,
        owner: int | None,
        complain: Callable[[str], None],
        durable: Callable[[], None],
    ) -> None:
        self._name = f"{name}-{ranks.rank}"  # a copy belongs to a place in the group, as no checkpoint does
        self._ranks, self._owner, self._complain, self._durable = ranks, owner, complain, durable
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="memory copies")
        self._slots: list[ShardImage] = []
        self._keeper: MemoryKeeper | None = None
        self._last: Future[bool] | None = None
        self._turn = 0
        self._rest = 0  # takes without a copy that are to come
        self._copied: torch.cuda.Event | None = None

    def take(self, version: Version, state: Mapping[str, Stateful], info: Mapping[str, Any]) -> None:
        """Copy the state as it is now. A collective.

        Args:
            version: (attempt, step).
            state: tensors (this rank's parts are copied) and plain JSON values (rank 0's count).
            info: about the run; a copy comes back only where it is the same.
        """
        if self._rest:
            self._rest -= 1
            return
        tensors, values = flatten({name: part.state_dict() for name, part in state.items()})
        mine = {name: local(tensor).detach() for name, tensor in tensors.items()}
        if self._last is None:
            self._neighbours = self._ranks.gather(here := socket.gethostname()).count(here)
        standing = self._ranks.all_reduce_min(self._stands(mine))
        if standing == _OFF:
            self._rest = _AGAIN
            self._let_go()
            return
        if standing == _WHOLE:
            self._turn ^= 1
        slot = self._slots[self._turn]
        os.ftruncate(slot.fd, slot.size)  # without its record
        self._copied = copied = slot.fill(list(mine.values()))
        record = {"place": list(version), "run": _digest(info, mine), "values": {}}
        if self._ranks.rank == 0:
            record["values"] = json.loads(to_json(values))
        self._last = self._thread.submit(self._seal, slot, copied, record)

    def fence(self) -> None:
        """To be called before the state changes next: waits, on the device, for what `take` still copies."""
        if self._copied is not None:
            self._copied.wait()
            self._copied = None

    def restore(
        self, state: Mapping[str, Stateful], info: Mapping[str, Any], attempt: int, newer_than: Version | None
    ) -> Copy | None:
        """Bring objects to the newest state that all ranks have a copy of. A collective; to be called before `take`.

        What there was is gone afterwards, used or not: a copy with which the workers die before they have made another
        one is not tried again.

        Args:
            state, info: as for `take`.
            attempt: that took it, the one before this: a later one may have gone back behind it.
            newer_than: (attempt, step) of a checkpoint; a copy that is not newer is not used.

        Returns:
            None if there is no such copy, and then nothing has changed.
        """
        files = claim(self._name)
        try:
            return self._restore(files, state, info, attempt, newer_than)
        finally:
            for file in files:
                os.close(file)

    def forget(self) -> None:
        """The state is another one now: what was copied does not lead to it."""
        if self._last is not None:
            self._last.result()
        for slot in self._slots:
            os.ftruncate(slot.fd, slot.size)

    def close(self) -> None:
        """Let go of memory and processes."""
        self._thread.shutdown()
        self._let_go()

    def _let_go(self) -> None:
        if self._keeper is not None:
            self._keeper.release()
            self._keeper = None
        for slot in self._slots:
            slot.close()
        self._slots = []

    def _stands(self, mine: Mapping[str, torch.Tensor]) -> int:
        """How this rank's last copy came out; before the first one, whether there can be any."""
        if self._last is not None:
            return _WHOLE if self._last.result() else _CUT
        try:
            self._lay_out(mine)
        except (OSError, RuntimeError) as error:  # the latter from CUDA, which may lock no more memory
            self._complain(f"no copies in memory for now: {error}")
            return _OFF
        return _WHOLE

    def _lay_out(self, mine: Mapping[str, torch.Tensor]) -> None:
        size = 2 * sum(tensor.nbytes for tensor in mine.values())
        free, total = _room()
        if free - self._neighbours * size < _FREE * total:
            needed = f"{size / 1e9:.1f} GB beside each of {self._neighbours} ranks"
            raise OSError(f"they need {needed}, and {free / 1e9:.1f} GB are free on this node")
        for file in claim(self._name):  # what nobody has asked for
            os.close(file)
        self._slots = [ShardImage("", _items(mine)) for _ in range(2)]
        self._keeper = MemoryKeeper(self._name, [slot.fd for slot in self._slots], self._owner)

    def _seal(self, slot: ShardImage, copied: torch.cuda.Event | None, record: dict[str, Any]) -> bool:
        """Write the record of a copy; whether it counts."""
        if copied is not None:
            copied.synchronize()
        try:
            self._durable()
            text = json.dumps({**record, "sum": slot.digest()}).encode()
            os.pwrite(slot.fd, _HEAD.pack(len(text), xxhash.xxh3_64_intdigest(text)) + text, slot.size)
        except OSError as error:
            self._complain(f"the copy in memory of step {record['place'][1]} does not count: {error}")
            return False
        return True

    def _restore(
        self,
        files: Sequence[int],
        state: Mapping[str, Stateful],
        info: Mapping[str, Any],
        attempt: int,
        newer_than: Version | None,
    ) -> Copy | None:
        trees = {name: part.state_dict() for name, part in state.items()}
        mine = {name: local(tensor).detach() for name, tensor in flatten(trees)[0].items()}
        found: dict[Version, tuple[ShardImage, dict[str, Any]]] = {}
        if files:
            size = ShardImage.size_of(_items(mine))
            for file in files:
                record = _record(file, size)
                if record and record["place"][0] == attempt and record["run"] == _digest(info, mine):
                    found[attempt, record["place"][1]] = ShardImage("", _items(mine), file), record
        common = set.intersection(*map(set, self._ranks.gather(list(found))))
        if not common or (newer_than is not None and max(common) <= newer_than):
            return None
        copy, record = found[max(common)]

        def check() -> dict[str, Any]:
            if copy.digest() != record["sum"]:
                raise CheckpointDamaged(f"the copy in memory of step {record['place'][1]} does not match its checksum")
            values: dict[str, Any] = record["values"]
            return values

        try:
            values = self._ranks.all_or_raise(check)[0]
        except RankError as error:
            if self._ranks.rank == 0:
                self._complain(f"passing over a copy in memory: {error}")
            return None
        for tensor, kept in zip(mine.values(), copy.tensors, strict=True):
            tensor.copy_(kept)
        for name, part in state.items():
            part.load_state_dict(merge(trees[name], values.get(name, {})))
        return Copy(max(common), values, dict(info))


def _items(mine: Mapping[str, torch.Tensor]) -> list[tuple[MetadataIndex, torch.Tensor]]:
    return [(MetadataIndex(name), tensor) for name, tensor in mine.items()]


def _record(file: int, size: int) -> dict[str, Any] | None:
    """What is written behind a copy of that size; None if that is not a whole record."""
    head = os.pread(file, _HEAD.size, size)
    if len(head) < _HEAD.size:
        return None
    length, digest = _HEAD.unpack(head)
    if length > os.fstat(file).st_size:
        return None
    text = os.pread(file, length, size + _HEAD.size)
    if xxhash.xxh3_64_intdigest(text) != digest:
        return None
    record: dict[str, Any] = json.loads(text)
    return record


def _digest(info: Mapping[str, Any], mine: Mapping[str, torch.Tensor]) -> str:
    """Of what must be the same for a copy to be of use."""
    layout = [(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in mine.items()]
    return xxhash.xxh3_128_hexdigest(json.dumps([info, layout], sort_keys=True).encode())


def _room() -> tuple[int, int]:
    """Bytes that are free, and all that there are, on this machine or in this container, whichever is less."""
    memory = psutil.virtual_memory()
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container of its own, or "max"
        return memory.available, memory.total
    return min(memory.available, limit - used), min(memory.total, limit)
