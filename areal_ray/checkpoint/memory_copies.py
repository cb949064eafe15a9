"""Copies of the state in host memory that outlive a killed rank: between two checkpoints, far more often than those.

Each rank copies the parts of the state that it holds into memory that a process beside it keeps (MemoryKeeper), and the
rank that takes its place on the same machine restores them. A copy is no checkpoint: it is gone with the machine, with
a change of the number of ranks or of their places, and with the end of the run; then the newest checkpoint counts. The
idea is that of Gemini (Wang et al., SOSP 2023) and DLRover's Flash Checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from areal_ray.checkpoint.format.manifest import CheckpointDamaged
from areal_ray.checkpoint.format.shard_file import KeptImages, ShardImage
from areal_ray.checkpoint.tree import flatten, local, merge, to_json
from areal_ray.distributed import RankError, Ranks
from areal_ray.distributed.device import Uploads, device_thread
from areal_ray.processes.memory_keeper import free_memory, read_record, write_record

_FREE = 0.1  # share of a machine's memory that must be left
_OFF, _CUT, _WHOLE = range(3)  # of a rank: it cannot copy; its last copy cannot be used; it can
Version = tuple[int, int]  # (attempt, step), by which copies and checkpoints are ordered


@dataclass(frozen=True)
class Copy:
    """A copy that was restored.

    Args:
        version: (attempt, step) at which it was saved.
        values: plain values of the state, by object, as state.json would hold them.
        info: about the run that saved it.
    """

    version: Version
    values: dict[str, Any]
    info: dict[str, Any]


class MemoryCopies:
    """Two images in turn: from the first copy on, one is whole at any moment, the same one on all ranks.

    A copy counts when its record, written last, is there. All ranks wait for each other's records before the older
    copy is overwritten, so that it does not matter when which of them is killed.

    Args:
        name: unique to this submission of the run.
        ranks: all ranks of the job.
        owner: process id of the node's own process, with which the memory goes; None: it stays without one.
        complain: prints a line for the user.
        durable: waits until what was written about the steps so far is durable (OSError: it is not; then the copy does
            not count).
        retry_after: how many copies are left out, where there was no room for one, before the next try.
    """

    def __init__(
        self,
        name: str,
        ranks: Ranks,
        owner: int | None,
        complain: Callable[[str], None],
        durable: Callable[[], None],
        retry_after: int = 32,
    ) -> None:
        self._name = f"{name}-{ranks.rank}"  # a copy belongs to a place in the group, as no checkpoint does
        self._ranks, self._complain, self._durable = ranks, complain, durable
        self._thread = device_thread("memory copies")
        self._kept = KeptImages(self._name, owner)
        self._layout: list[Any] = []
        self._laid_out: Future[None] | None = None
        self._last: Future[bool] | None = None
        self._turn = 0
        self._retry_after, self._left_out = retry_after, 0
        self._copied: torch.cuda.Event | None = None

    def prepare(self, state: Mapping[str, Stateful]) -> None:
        """To be called once before training: make the memory beside the first steps. A collective."""
        tensors, _ = flatten({name: part.state_dict() for name, part in state.items()})
        mine = {name: local(tensor).detach() for name, tensor in tensors.items()}
        self._count_neighbours()
        self._laid_out = self._thread.submit(self._lay_out, mine, free_memory())

    def save(self, version: Version, state: Mapping[str, Stateful], info: Mapping[str, Any]) -> None:
        """Copy the state as it is now. A collective.

        Args:
            version: (attempt, step).
            state: tensors (this rank's parts are copied) and plain JSON values (rank 0's count).
            info: about the run; a copy is restored only where it is the same.
        """
        if self._left_out:
            self._left_out -= 1
            return
        tensors, values = flatten({name: part.state_dict() for name, part in state.items()})
        mine = {name: local(tensor).detach() for name, tensor in tensors.items()}
        if self._laid_out is not None:
            self._laid_out.exception()  # waits
        if self._kept.images and _layout(mine) != self._layout:  # an optimizer whose state came with its first steps
            self._start_anew()
        if self._last is None and self._laid_out is None:
            self._count_neighbours()
        status = self._ranks.all_reduce_min(self._status(mine))
        if status == _OFF:
            self._left_out = self._retry_after
            self._kept.release()
            return
        if status == _WHOLE:
            self._turn ^= 1
        image = self._kept.images[self._turn]
        os.ftruncate(image.fd, image.size)  # without its record
        whole = [not isinstance(tensor, DTensor) for tensor in tensors.values()]
        self._copied = copied = image.fill(list(mine.values()), whole)
        record = {"version": list(version), "run": _digest(info, mine), "values": {}}
        if self._ranks.rank == 0:
            record["values"] = json.loads(to_json(values))
        self._last = self._thread.submit(self._seal, image, copied, record)

    def fence(self) -> None:
        """To be called before the state changes next: waits, on the device, for what `save` still copies."""
        if self._copied is not None:
            self._copied.wait()
            self._copied = None

    def restore(
        self, state: Mapping[str, Stateful], info: Mapping[str, Any], attempt: int, newer_than: Version | None
    ) -> Copy | None:
        """Bring objects to the newest state that all ranks have a copy of. A collective; to be called before `save`.

        All copies of earlier attempts are gone afterwards, used or not: a copy with which the workers die before they
        have made another one is not tried again. Their memory is used for the next ones.

        Args:
            state, info: as for `save`.
            attempt: that saved it, the one before this: a later one may have gone back behind it.
            newer_than: (attempt, step) of a checkpoint; a copy that is not newer is not used.

        Returns:
            None if there is no such copy, and then nothing has changed.
        """
        trees = {name: part.state_dict() for name, part in state.items()}
        mine = {name: local(tensor).detach() for name, tensor in flatten(trees)[0].items()}
        size = ShardImage.size_of(list(mine.values()))
        files = self._kept.claim(size)
        try:
            found = self._find(files, size, mine, info, attempt, newer_than)
            if found is not None:
                uploads = Uploads()
                for tensor, kept in zip(mine.values(), found[0].tensors, strict=True):
                    uploads.copy(tensor, kept)
                uploads.wait()
        finally:
            self._kept.erase(size)
        if found is None:
            return None
        _, version, values = found
        for name, part in state.items():
            part.load_state_dict(merge(trees[name], values.get(name, {})))
        return Copy(version, values, dict(info))

    def forget(self) -> None:
        """Make all copies useless: the state is another one now, and they do not lead to it."""
        if self._last is not None:
            self._last.result()
        if self._kept.images:
            self._kept.erase(self._kept.images[0].size)

    def close(self) -> None:
        """Give memory and processes back."""
        self._thread.shutdown()
        self._kept.release()

    def _start_anew(self) -> None:
        if self._last is not None:
            self._last.result()
        self._kept.release()
        self._last = self._laid_out = None

    def _count_neighbours(self) -> None:
        self._neighbours = self._ranks.gather(here := socket.gethostname()).count(here)

    def _status(self, mine: Mapping[str, torch.Tensor]) -> int:
        """How this rank's last copy came out; before the first one, whether there can be any."""
        if self._last is not None:
            return _WHOLE if self._last.result() else _CUT
        laid_out, self._laid_out = self._laid_out, None
        try:
            if laid_out is not None:
                laid_out.result()
            else:
                self._lay_out(mine, free_memory())
        except (OSError, RuntimeError, MemoryError) as error:
            self._complain(f"no copies in memory for now: {error}")
            return _OFF
        return _WHOLE

    def _lay_out(self, mine: Mapping[str, torch.Tensor], memory: tuple[int, int]) -> None:
        items, (free, total) = list(mine.values()), memory  # as it was before any rank of the node took some
        new = self._kept.missing(ShardImage.size_of(items))
        if new and free - self._neighbours * new < _FREE * total:
            needed = f"{new / 1e9:.1f} GB beside each of {self._neighbours} ranks"
            raise OSError(f"they need {needed}, and {free / 1e9:.1f} GB are free on this node")
        self._kept.lay_out(items)
        self._layout = _layout(mine)
        if reason := self._kept.images[0].not_pinned:
            self._complain(f"copies in memory keep training waiting: {reason}")

    def _seal(self, image: ShardImage, copied: torch.cuda.Event | None, record: dict[str, Any]) -> bool:
        """Write the record of a copy; whether it counts."""
        if copied is not None:
            copied.synchronize()
        try:
            self._durable()
            write_record(image.fd, image.size, {**record, "sum": image.digest()})
        except OSError as error:
            self._complain(f"the copy in memory of step {record['version'][1]} does not count: {error}")
            return False
        return True

    def _find(
        self,
        files: Sequence[int],
        size: int,
        mine: Mapping[str, torch.Tensor],
        info: Mapping[str, Any],
        attempt: int,
        newer_than: Version | None,
    ) -> tuple[ShardImage, Version, dict[str, Any]] | None:
        """This rank's image of the newest copy that all ranks have, its version and the plain values. A collective."""
        found: dict[Version, tuple[ShardImage, dict[str, Any]]] = {}
        for file in files:
            record = read_record(file, size)
            if record and record["version"][0] == attempt and record["run"] == _digest(info, mine):
                found[attempt, record["version"][1]] = ShardImage("", list(mine.values()), file), record
        common = set.intersection(*map(set, self._ranks.gather(list(found))))
        if not common or (newer_than is not None and max(common) <= newer_than):
            return None
        image, record = found[max(common)]

        def check() -> dict[str, Any]:
            if image.digest() != record["sum"]:
                raise CheckpointDamaged(f"the copy in memory of step {max(common)[1]} does not match its checksum")
            values: dict[str, Any] = record["values"]
            return values

        try:
            values = self._ranks.broadcast(self._ranks.all_or_raise(check))
        except RankError as error:
            if self._ranks.rank == 0:
                self._complain(f"passing over a copy in memory: {error}")
            return None
        return image, max(common), values


def _layout(mine: Mapping[str, torch.Tensor]) -> list[Any]:
    return [(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in mine.items()]


def _digest(info: Mapping[str, Any], mine: Mapping[str, torch.Tensor]) -> str:
    """Digest of everything that must be the same for a copy to be restored."""
    return xxhash.xxh3_128_hexdigest(json.dumps([info, _layout(mine)], sort_keys=True).encode())
