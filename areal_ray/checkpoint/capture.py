"""The state of one moment, on its way from the ranks' tensors to a committed checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from areal_ray.checkpoint.manifest import MANIFEST, METADATA, STATE, FileRecord, Manifest
from areal_ray.checkpoint.shard_file import ShardImage
from areal_ray.checkpoint.tree import flatten, local, to_json
from areal_ray.distributed import RankError, Ranks
from areal_ray.distributed.device import device_thread
from areal_ray.storage import Storage

_Written = tuple[dict[Any, Any], FileRecord] | None


class _Plan:
    """DCP's plan of a save: DTensors are written where they lie, replicated tensors once. A collective to make.

    Attributes:
        indices: of this rank's parts.
        metadata: DCP's, of all parts, on rank 0; None elsewhere.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], ranks: Ranks) -> None:
        self._planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._planner.set_up_planner(tensors, is_coordinator=ranks.rank == 0)
        self._local = self._planner.create_local_plan()
        gathered = ranks.gather_to_rank_zero(self._local)
        plans, self.metadata = ranks.all_or_raise(lambda: self._plan_all(gathered))
        self._mine: SavePlan = self._planner.finish_plan(ranks.scatter(plans))
        self.indices = [item.index for item in self._mine.items]

    def _plan_all(self, gathered: list[SavePlan] | None) -> tuple[list[SavePlan] | None, Metadata | None]:
        """On rank 0 only: with N ranks and T tensors there are N x T parts, and each rank needs to know its own."""
        return (None, None) if gathered is None else self._planner.create_global_plan(gathered)

    def fits(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether the plan is that of these tensors too; the same names and shapes, the same parts here."""
        other = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        other.set_up_planner(tensors, is_coordinator=self._planner.is_coordinator)
        return bool(other.create_local_plan().items == self._local.items)

    def whole(self, tensors: dict[str, torch.Tensor]) -> list[bool]:
        """Which of `parts` are whole tensors."""
        return [not isinstance(tensors[index.fqn], DTensor) for index in self.indices]

    def parts(self, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The parts of these tensors that this rank writes, in the order of `indices`."""
        self._planner.state_dict = tensors
        parts = []
        for item in self._mine.items:
            part = self._planner.resolve_data(item)
            assert isinstance(part, torch.Tensor), item
            parts.append(part.detach())
        return parts


class Capture:
    """Takes the state of a moment; plan and image are made at the first save and as long as the state is laid out so.

    Args:
        ranks: all ranks of the job.
        complain: prints a line for the user.
    """

    def __init__(self, ranks: Ranks, complain: Callable[[str], None] = print) -> None:
        self._ranks, self._complain = ranks, complain
        self._plan: _Plan | None = None
        self._image: Future[ShardImage | None] = _done(None)
        self._new = False  # whether nothing was copied into it yet
        self._thread: ThreadPoolExecutor | None = None

    def prepare(self, state: Mapping[str, Stateful]) -> None:
        """Make plan and image ahead of the first save, beside the first steps. A collective, if there is a GPU.

        To pin new memory takes several times as long as to copy into it. On a CPU it would take the cores that train,
        and nothing is done.
        """
        tensors, _ = flatten({name: part.state_dict() for name, part in state.items()})
        if any(local(tensor).is_cuda for tensor in tensors.values()):
            self._thread = device_thread("checkpoint memory")
            self._lay_out(tensors)

    def take(self, directory: Storage, state: Mapping[str, Stateful], info: Mapping[str, Any]) -> Captured:
        """Make the directory and copy the state. A collective; arguments as for `CheckpointWriter.begin`.

        Raises:
            RankError: on every rank, if there is such a directory, or not enough memory on one of them.
        """
        tensors, values = flatten({name: part.state_dict() for name, part in state.items()})
        text = to_json(values)

        def prepare() -> bool:
            if self._ranks.rank == 0:
                directory.make()
            return self._plan is not None and self._plan.fits(tensors)

        if not self._ranks.all_reduce_min(self._ranks.all_or_raise(prepare)):
            self._lay_out(tensors)
        plan = self._plan
        assert plan is not None
        try:
            image = self._ranks.all_or_raise(self._image.result)
        except RankError:
            self._plan = None  # the next save tries again
            raise
        if self._new:
            self._tell(image.not_pinned if image is not None else None)
            self._new = False
        copied = image.fill(plan.parts(tensors), plan.whole(tensors)) if image is not None else None
        return Captured(directory, plan.metadata, image, copied, text, dict(info))

    def close(self) -> None:
        """Give the memory back."""
        if self._image.exception() is None and (image := self._image.result()) is not None:
            image.close()
        self._plan, self._image = None, _done(None)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _lay_out(self, tensors: dict[str, torch.Tensor]) -> None:
        thread, self._thread = self._thread, None
        self.close()
        plan = _Plan(tensors, self._ranks)

        def allocate() -> ShardImage | None:
            if not plan.indices:
                return None
            return ShardImage(_shard_name(self._ranks.rank), list(zip(plan.indices, plan.parts(tensors), strict=True)))

        self._plan, self._thread, self._new = plan, thread, True
        self._image = thread.submit(allocate) if thread is not None else _attempt(allocate)

    def _tell(self, not_pinned: str | None) -> None:
        """Say, once for all ranks, if some of them have no pinned memory. A collective."""
        if self._ranks.all_reduce_min(not_pinned is None):
            return
        reasons = self._ranks.gather_to_rank_zero(not_pinned)
        if reasons is not None:
            concerned = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
            more = f" (and {len(concerned) - 1} more ranks)" if len(concerned) > 1 else ""
            self._complain(
                f"saves keep training waiting while they copy: rank {concerned[0][0]}{more}: {concerned[0][1]}"
            )


def _done(image: ShardImage | None) -> Future[ShardImage | None]:
    return _attempt(lambda: image)


def _attempt(work: Callable[[], ShardImage | None]) -> Future[ShardImage | None]:
    future: Future[ShardImage | None] = Future()
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001  (raised again where the ranks agree upon it)
        future.set_exception(error)
    return future


@dataclass(frozen=True)
class Captured:
    """The state of one moment in host memory.

    Args:
        directory: of the checkpoint.
        metadata: DCP's, but for where the tensors lie, on rank 0.
        image: of this rank's shard file; None if it writes none.
        copied: after this event the image is complete; None: it is.
        text: state.json.
        info: for the manifest.
    """

    directory: Storage
    metadata: Metadata | None
    image: ShardImage | None
    copied: torch.cuda.Event | None
    text: bytes
    info: dict[str, Any]

    def finish(self, write: Callable[[ShardImage], dict[str, Any]], ranks: Ranks) -> Manifest | None:
        """Write and commit it; the manifest, on rank 0. A collective.

        Args:
            write: writes the image to the directory; a manifest's record of the file.
            ranks: all ranks of the job.

        Raises:
            RankError: on every rank, if any of them could not write.
        """

        def write_mine() -> _Written:
            if self.image is None:
                return None
            if self.copied is not None:
                self.copied.synchronize()
            return self.image.where, FileRecord(**write(self.image))

        written = ranks.gather_to_rank_zero(ranks.all_or_raise(write_mine))
        committed: list[Manifest] = []
        # Its outcome is for all, but not the manifest, which grows with ranks and tensors.
        ranks.on_rank_zero(lambda: committed.append(self._commit(written or [])))
        return committed[0] if committed else None

    def _commit(self, written: list[_Written]) -> Manifest:
        files: dict[str, FileRecord] = {}
        storage_data: dict[Any, Any] = {}
        for shard in filter(None, written):
            where, record = shard
            storage_data.update(where)
            files[next(iter(where.values())).relative_path] = record
        assert self.metadata is not None
        metadata = replace(self.metadata, storage_data=storage_data, planner_data=None, storage_meta=StorageMeta())
        files[STATE] = _write_small(self.directory, STATE, self.text)
        files[METADATA] = _write_small(self.directory, METADATA, pickle.dumps(metadata))
        manifest = Manifest(self.info, files)
        # In one piece: a torn one is damage, not a save that was cut off.
        self.directory.publish(MANIFEST, manifest.encode())
        return manifest


def _shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.distcp"  # a number among shards; nothing on loading depends on who wrote it


def _write_small(directory: Storage, name: str, data: bytes) -> FileRecord:
    """Write a small file that must not exist yet."""
    with directory.create(name) as file:
        file.write(data)
    return FileRecord(len(data), xxhash.xxh3_128_hexdigest(data))
