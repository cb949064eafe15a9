"""Saving: every rank its part, then the metadata, then the manifest.

The order is what makes it safe to be killed at any moment: the directory is new, shards are made durable, then
`.metadata`, then the manifest, without which nobody takes the directory for a checkpoint.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint.manifest import MANIFEST, METADATA, STATE, FileRecord, Manifest
from areal_ray.checkpoint.shard_file import write_shard, write_small
from areal_ray.checkpoint.staging import Staging
from areal_ray.checkpoint.tree import flatten, to_json
from areal_ray.distributed import Ranks
from areal_ray.processes.file_writer import FileWriter
from areal_ray.storage import Storage

_Written = tuple[dict[Any, Any], FileRecord] | None


class CheckpointWriter(Protocol):
    """Begins saves. Every method but `fence` is a collective."""

    def begin(self, directory: Storage, state: Mapping[str, Stateful], info: Mapping[str, Any]) -> Future[Manifest]:
        """Take the state as it is now and see to it that it is written.

        Args:
            directory: must not exist.
            state: what to save; tensors (plain ones equal on all ranks, DTensors in parts) and plain JSON values.
            info: what the manifest says about this save.

        Returns:
            The manifest, on every rank, when everything is durable and committed; or RankError, on every rank.
        """
        ...

    def fence(self) -> None:
        """To be called before the state changes next: waits, on the device, for what `begin` still copies."""
        ...

    def close(self) -> None:
        """Finish what is under way and let go of memory and processes."""
        ...


class SyncWriter:
    """Writes before it returns.

    Args:
        ranks: all ranks of the job.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def begin(self, directory: Storage, state: Mapping[str, Stateful], info: Mapping[str, Any]) -> Future[Manifest]:
        return _settled(lambda: save(directory, state, info, self._ranks))

    def fence(self) -> None: ...

    def close(self) -> None: ...


class AsyncWriter:
    """Copies the state to shared memory and returns; a process beside each rank writes it, a thread commits.

    One save at a time: `begin` waits for the one before. The memory is that of the rank's own state, once.

    Args:
        ranks: all ranks of the job.
        background: all ranks, over a process group of its own: what a thread sends must not mix with the training's.
    """

    def __init__(self, ranks: Ranks, background: Ranks) -> None:
        self._ranks, self._background = ranks, background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._file_writer = FileWriter()
        self._file_writer.start()
        self._plan: _Plan | None = None
        self._staging: Staging | None = None
        self._copied: torch.cuda.Event | None = None
        self._last: Future[Manifest] | None = None

    def begin(self, directory: Storage, state: Mapping[str, Stateful], info: Mapping[str, Any]) -> Future[Manifest]:
        if self._last is not None:
            self._last.exception()  # waits; whoever holds the future hears of a failure
        tensors, values = flatten({name: part.state_dict() for name, part in state.items()})
        text = to_json(values)

        def prepare() -> bool:
            if self._ranks.rank == 0:
                directory.make()
            return self._plan is None or not self._plan.fits(tensors)

        prepared = _settled(lambda: self._ranks.all_or_raise(prepare))
        if prepared.exception() is not None:
            return prepared
        if any(prepared.result()):
            self._lay_out(tensors)
        plan, staging = self._plan, self._staging
        assert plan is not None
        if staging is not None:
            plan.planner.state_dict = tensors
            self._copied = staging.fill([plan.data(item) for item in plan.mine.items])
        copied = self._copied
        self._last = self._thread.submit(self._finish, directory, plan, staging, copied, text, dict(info))
        return self._last

    def fence(self) -> None:
        if self._copied is not None:
            self._copied.wait()
            self._copied = None

    def close(self) -> None:
        self._thread.shutdown()
        self._file_writer.close()

    def _lay_out(self, tensors: dict[str, torch.Tensor]) -> None:
        self._plan = _Plan(tensors, self._ranks)
        if self._staging is not None:
            self._staging.close()
        items = [(item.index, self._plan.data(item)) for item in self._plan.mine.items]
        self._staging = Staging(_shard_name(self._ranks.rank), items) if items else None

    def _finish(
        self,
        directory: Storage,
        plan: _Plan,
        staging: Staging | None,
        copied: torch.cuda.Event | None,
        text: bytes,
        info: dict[str, Any],
    ) -> Manifest:
        def write() -> _Written:
            if staging is None:
                return None
            if copied is not None:
                copied.synchronize()
            name = _shard_name(self._ranks.rank)
            record = self._file_writer.write(directory, name, staging.path, staging.size, staging.chunks)
            return staging.where, FileRecord(**record)

        written = self._background.all_or_raise(write)
        return self._background.on_rank_zero(lambda: _commit(directory, plan.metadata, written, text, info))


def save(directory: Storage, state: Mapping[str, Stateful], info: Mapping[str, Any], ranks: Ranks) -> Manifest:
    """Write a checkpoint and return when it is committed; arguments as for `CheckpointWriter.begin`.

    Raises:
        RankError: on every rank, if any of them could not write.
    """
    tensors, values = flatten({name: part.state_dict() for name, part in state.items()})
    text = to_json(values)
    ranks.on_rank_zero(directory.make)
    plan = _Plan(tensors, ranks)

    def write() -> _Written:
        if not plan.mine.items:
            return None
        return write_shard(
            directory, _shard_name(ranks.rank), ((item.index, plan.data(item)) for item in plan.mine.items)
        )

    written = ranks.all_or_raise(write)
    return ranks.on_rank_zero(lambda: _commit(directory, plan.metadata, written, text, info))


class _Plan:
    """Who writes what, as DCP plans it: DTensors where they lie, replicated tensors once. A collective to make."""

    def __init__(self, tensors: dict[str, torch.Tensor], ranks: Ranks) -> None:
        self.planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.planner.set_up_planner(tensors, is_coordinator=ranks.rank == 0)
        self._local = self.planner.create_local_plan()
        plans, self.metadata = self.planner.create_global_plan(ranks.gather(self._local))
        self.mine: SavePlan = self.planner.finish_plan(plans[ranks.rank])

    def fits(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether the plan is that of these tensors too; the same names and shapes, the same parts here."""
        other = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        other.set_up_planner(tensors, is_coordinator=self.planner.is_coordinator)
        return bool(other.create_local_plan().items == self._local.items)

    def data(self, item: Any) -> torch.Tensor:
        """The tensor of a write item, as it is now."""
        tensor = self.planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        return tensor.detach()


def _shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.distcp"  # a number among shards; nothing on loading depends on who wrote it


def _commit(
    directory: Storage, metadata: Metadata, written: list[_Written], text: bytes, info: Mapping[str, Any]
) -> Manifest:
    files: dict[str, FileRecord] = {}
    storage_data: dict[Any, Any] = {}
    for shard in filter(None, written):
        where, record = shard
        storage_data.update(where)
        files[next(iter(where.values())).relative_path] = record
    metadata = replace(metadata, storage_data=storage_data, planner_data=None, storage_meta=StorageMeta())
    files[STATE] = write_small(directory, STATE, text)
    files[METADATA] = write_small(directory, METADATA, pickle.dumps(metadata))
    manifest = Manifest(dict(info), files)
    directory.publish(MANIFEST, manifest.encode())  # in one piece: a torn one is damage, not a save that was cut off
    return manifest


def _settled(work: Callable[[], Any]) -> Future[Any]:
    """The outcome of work done now, as a future."""
    future: Future[Any] = Future()
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001  (raised again by whoever asks for the result)
        future.set_exception(error)
    return future
