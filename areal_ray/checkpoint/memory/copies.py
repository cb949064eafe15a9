"""Copies of the state in host memory that outlive a killed rank: between two checkpoints, far more often than those.

Each rank copies the parts of the state that it holds into memory that a process beside it keeps (MemoryKeeper), and the
rank that takes its place on the same machine restores them. A copy is no checkpoint: it is gone with the machine, but
for what a partner has, and with the end of the run; then the newest checkpoint counts.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from areal_ray.checkpoint.format.shard_file import ShardImage
from areal_ray.checkpoint.memory.kept_images import ClaimedFiles, KeptImages
from areal_ray.checkpoint.memory.partners import Partners
from areal_ray.checkpoint.memory.parts import digest
from areal_ray.checkpoint.memory.restore import restore
from areal_ray.checkpoint.memory.search import Copy, Version
from areal_ray.checkpoint.tree import flatten, local, to_json
from areal_ray.distributed import Ranks
from areal_ray.distributed.device import device_thread
from areal_ray.processes.memory_keeper import free_memory, write_record

# Of a rank: it cannot copy; its last copy is on its way to the partner; that cannot be used; it can.
_OFF, _ON_ITS_WAY, _CUT, _WHOLE = range(4)


class MemoryCopies:
    """Two images in turn: from the first copy on, one is whole at any moment, the same one on all ranks.

    A copy counts when its record, written last, is there. All ranks wait for each other's records before the older
    copy is overwritten, so that it does not matter when which of them is killed.

    With partners each copy is sent on, in the background, to two files in turn again. One that is due while the last is
    on its way is left out, on all ranks: training never waits for the network, and one is whole at any moment at both.

    Args:
        name: unique to this submission of the run.
        ranks: all ranks of the job.
        owner: process id of the node's own process, with which the memory goes; None: it stays without one.
        complain: prints a line for the user.
        durable: waits until what was written about the steps so far is durable (OSError: it is not; then the copy does
            not count).
        retry_after: how many copies are left out, where there was no room for one, before the next try.
        partners: where copies go in addition; None: nowhere, and they are restored in the places that made them only.
    """

    def __init__(
        self,
        name: str,
        ranks: Ranks,
        owner: int | None,
        complain: Callable[[str], None],
        durable: Callable[[], None],
        retry_after: int = 32,
        partners: Partners | None = None,
    ) -> None:
        self._name = f"{name}-{ranks.rank}"  # a copy belongs to a place in the group, as no checkpoint does
        self._ranks, self._complain, self._durable = ranks, complain, durable
        self._thread = device_thread("memory copies")
        self._claimed, self._partners = ClaimedFiles(), partners
        self._kept = KeptImages(self._name, owner, self._claimed)
        self._laid_out: Future[None] | None = None
        self._last: Future[bool] | None = None
        self._sent: Future[bool] | None = None
        self._turn = 0
        self._retry_after, self._left_out = retry_after, 0
        self._told_late = False
        self._copied: torch.cuda.Event | None = None

    def prepare(self, state: Mapping[str, Stateful]) -> None:
        """To be called once before training: make the memory beside the first steps. A collective."""
        tensors, _ = flatten({name: part.state_dict() for name, part in state.items()})
        self._meet(tensors)
        self._laid_out = self._thread.submit(self._lay_out, free_memory())

    def save(self, version: Version, state: Mapping[str, Stateful], info: Mapping[str, Any]) -> None:
        """Copy the state as it is now. A collective.

        Args:
            version: (attempt, step).
            state: tensors (this rank's parts are copied) and plain JSON values (rank 0's count).
            info: about the run; a copy is restored only where it is the same, world_size and mesh apart.
        """
        if self._left_out:
            self._left_out -= 1
            return
        tensors, values = flatten({name: part.state_dict() for name, part in state.items()})
        if self._laid_out is not None:
            self._laid_out.exception()  # waits
        if self._kept.parts and not self._kept.fit(tensors):  # an optimizer whose state came with its first steps
            self._start_anew()
        if self._last is None and self._laid_out is None:
            self._meet(tensors)
        status = self._ranks.all_reduce_min(self._status())
        if status == _OFF:
            self._left_out = self._retry_after
            self._start_anew()
            return
        if status == _ON_ITS_WAY:
            self._tell_late(version[1])
            return
        if status == _WHOLE:
            self._turn ^= 1
        image = self._kept.images[self._turn]
        os.ftruncate(image.fd, image.size)  # without its record
        whole = [not isinstance(tensor, DTensor) for tensor in tensors.values()]
        self._copied = copied = image.fill([local(tensor).detach() for tensor in tensors.values()], whole)
        first = self._ranks.rank == 0
        record: dict[str, Any] = {"version": list(version), "rank": self._ranks.rank, "ranks": self._ranks.size}
        record |= {"run": digest(info, self._kept.parts), "parts": self._kept.encoded}
        record |= {"values": json.loads(to_json(values)) if first else {}, "info": dict(info) if first else {}}
        self._last = last = self._thread.submit(self._seal, image, copied, record)
        if (partners := self._partners) is not None and partners.active:
            self._sent = self._thread.submit(partners.send, image, self._turn, last, self._claimed)

    def fence(self) -> None:
        """To be called before the state changes next: waits, on the device, for what `save` still copies."""
        if self._copied is not None:
            self._copied.wait()
            self._copied = None

    def restore(
        self, state: Mapping[str, Stateful], info: Mapping[str, Any], attempt: int, newer_than: Version | None
    ) -> Copy | None:
        """Bring objects to the newest state of which there are copies of all parts. A collective, before `save`.

        All copies of earlier attempts are gone afterwards, used or not: a copy with which the workers die before they
        have made another one is not tried again. Their memory is used for the next ones.

        Args:
            state, info: as for `save`.
            attempt: that saved it, the one before this: a later one may have gone back behind it.
            newer_than: (attempt, step) of a checkpoint; a copy that is not newer is not used.

        Returns:
            None if there is no such copy, and then nothing has changed.
        """
        if self._partners is not None:
            self._partners.claim(self._claimed)
        else:
            self._claimed.claim(self._name)
        try:
            options = self._ranks, self._partners, self._complain
            return restore(self._claimed, state, info, attempt, newer_than, *options)
        finally:
            self._claimed.erase()

    def forget(self) -> None:
        """Make all copies useless: the state is another one now, and they do not lead to it."""
        self._finish()
        self._kept.erase()
        if self._partners is not None:
            self._partners.erase()

    def close(self) -> None:
        """Give memory and processes back."""
        self._thread.shutdown()
        self._release()

    def _finish(self) -> None:
        """Wait for the thread."""
        for future in (self._last, self._sent):
            if future is not None:
                future.exception()

    def _start_anew(self) -> None:
        self._finish()
        self._release()
        self._last = self._sent = self._laid_out = None

    def _release(self) -> None:
        self._kept.release()
        self._claimed.close()
        if self._partners is not None:
            self._partners.release()

    def _meet(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hear who shares this machine's memory, and what is to be kept for others. A collective."""
        self._neighbours = self._ranks.gather(here := socket.gethostname()).count(here)
        size = self._kept.plan(tensors)
        self._guest_sizes = [] if self._partners is None else self._partners.meet(size)

    def _status(self) -> int:
        """How this rank's last copy came out; before the first one, whether there can be any."""
        if self._last is not None:
            return self._outcome(self._last)
        laid_out, self._laid_out = self._laid_out, None
        try:
            if laid_out is not None:
                laid_out.result()
            else:
                self._lay_out(free_memory())
        except (OSError, RuntimeError, MemoryError) as error:
            return self._no_room(error)
        return _WHOLE

    def _outcome(self, last: Future[bool]) -> int:
        if self._sent is None:
            return _WHOLE if last.result() else _CUT
        if not self._sent.done():
            return _ON_ITS_WAY
        try:
            return _WHOLE if self._sent.result() else _CUT
        except OSError as error:  # of guests; what fails of the network is a dead peer, and ends this rank, too
            return self._no_room(error)

    def _no_room(self, error: Exception) -> int:
        self._complain(f"no copies in memory for now: {error}")
        return _OFF

    def _lay_out(self, memory: tuple[int, int]) -> None:
        self._kept.lay_out(self._guest_sizes, self._neighbours, memory)
        if not self._guest_sizes:
            self._claimed.close()
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

    def _tell_late(self, step: int) -> None:
        if self._ranks.rank == 0 and not self._told_late:
            self._told_late = True
            self._complain(
                f"the copy in memory of step {step} is left out: the one before is on its way to the partners"
            )
