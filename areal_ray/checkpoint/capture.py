"""The state of one moment, on its way from the ranks' tensors to a committed checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from areal_ray.checkpoint.described import LayoutFiles, Names
from areal_ray.checkpoint.format.layout import LAYOUT
from areal_ray.checkpoint.format.manifest import MANIFEST, METADATA, STATE, FileRecord, Manifest
from areal_ray.checkpoint.format.shard_file import ShardImage
from areal_ray.checkpoint.format.sums import shard_name
from areal_ray.checkpoint.plan import SavePlan
from areal_ray.checkpoint.tree import flatten, local, to_json
from areal_ray.distributed import RankError, Ranks
from areal_ray.distributed.device import device_thread, give_way
from areal_ray.processes.dcp_pickle import MetadataParts
from areal_ray.processes.file_writer import Record, write_small
from areal_ray.storage import Storage


class FilesWriter(Protocol):
    """Writes what grows with the tensors, in this process or in another one."""

    def write_image(self, directory: Storage, image: ShardImage) -> dict[str, Record]:
        """Write a shard file and its table of checksums; the manifest's records of them."""
        ...

    def write_metadata(self, directory: Storage, name: str, parts: MetadataParts) -> Record:
        """Write DCP's `.metadata`; the manifest's record of it."""
        ...


class Capture:
    """Takes the state of a moment; plan and image are made at the first save and as long as the state is laid out so.

    Args:
        ranks: all ranks of the job.
        complain: prints a line for the user.
        may_commit: as for `writer.SyncWriter`.
    """

    def __init__(
        self,
        ranks: Ranks,
        complain: Callable[[str], None] = print,
        may_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self._ranks, self._complain, self._may_commit = ranks, complain, may_commit
        self._plan: SavePlan | None = None
        self._described: LayoutFiles | None = None
        self._image: Future[ShardImage | None] = _done(None)
        self._new = False  # whether nothing was copied into it yet
        self._thread: ThreadPoolExecutor | None = None

    def prepare(self, state: Mapping[str, Stateful]) -> None:
        """Make plan and image ahead of the first save, beside the first steps. A collective.

        To make new memory, and for a GPU to pin it, takes several times as long as to copy into it.
        """
        trees = {name: part.state_dict() for name, part in state.items()}
        self._thread = device_thread("checkpoint memory")
        self._lay_out(flatten(trees)[0], Names.of(state, trees))

    def take(self, directory: Storage, state: Mapping[str, Stateful], info: Mapping[str, Any]) -> Captured:
        """Make the directory and copy the state. A collective; arguments as for `CheckpointWriter.begin`.

        Raises:
            RankError: on every rank, if there is such a directory, or not enough memory on one of them.
        """
        trees = {name: part.state_dict() for name, part in state.items()}
        tensors, values = flatten(trees)
        text = to_json(values)

        def prepare() -> bool:
            if self._ranks.rank == 0:
                directory.make()
            return self._plan is not None and self._plan.fits(tensors)

        if not self._ranks.all_reduce_min(self._ranks.all_or_raise(prepare)):
            self._lay_out(tensors, Names.of(state, trees))
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
        mine = [tensors[name] for name in plan.mine]
        whole = [not isinstance(tensor, DTensor) for tensor in mine]
        copied = image.fill([local(tensor).detach() for tensor in mine], whole) if image is not None else None
        return Captured(directory, self._described, image, copied, text, dict(info), self._may_commit)

    def close(self) -> None:
        """Give the memory back."""
        if self._image.exception() is None and (image := self._image.result()) is not None:
            image.close()
        self._plan, self._image = None, _done(None)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _lay_out(self, tensors: dict[str, torch.Tensor], names: Names) -> None:
        thread, self._thread = self._thread, None
        self.close()
        plan = SavePlan(tensors, self._ranks)
        mine = [local(tensors[name]).detach() for name in plan.mine]

        def allocate() -> ShardImage | None:
            if thread is not None:
                give_way()
            return ShardImage(shard_name(self._ranks.rank), mine) if mine else None

        self._plan, self._thread, self._new = plan, thread, True
        self._described = LayoutFiles(*plan.planned, names) if plan.planned is not None else None
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
        described: what describes the layout, on rank 0.
        image: of this rank's shard file; None if it writes none.
        copied: after this event the image is complete; None: it is.
        text: state.json.
        info: for the manifest.
        may_commit: as for `writer.SyncWriter`.
    """

    directory: Storage
    described: LayoutFiles | None
    image: ShardImage | None
    copied: torch.cuda.Event | None
    text: bytes
    info: dict[str, Any]
    may_commit: Callable[[], None]

    def finish(self, files: FilesWriter, ranks: Ranks) -> Manifest | None:
        """Write and commit it; the manifest, on rank 0. A collective.

        Each rank sends the sums of its two files; what rank 0 does here grows with the ranks. What grows with the
        tensors, too, is left to `files`.

        Raises:
            RankError: on every rank, if any of them could not write.
        """

        def write_mine() -> dict[str, Record]:
            if self.image is None:
                return {}
            if self.copied is not None:
                self.copied.synchronize()
            return files.write_image(self.directory, self.image)

        written = ranks.gather_to_rank_zero(ranks.all_or_raise(write_mine))
        committed: list[Manifest] = []
        # Its outcome is for all, but not the manifest.
        ranks.on_rank_zero(lambda: committed.append(self._commit(files, written or [])))
        return committed[0] if committed else None

    def _commit(self, files: FilesWriter, written: list[dict[str, Record]]) -> Manifest:
        assert self.described is not None
        records = {name: record for each in written for name, record in each.items()}
        records[STATE] = write_small(self.directory, STATE, self.text)
        records[LAYOUT] = write_small(self.directory, LAYOUT, self.described.layout)
        records[METADATA] = files.write_metadata(self.directory, METADATA, self.described.parts)
        manifest = Manifest(self.info, {name: FileRecord(**record) for name, record in records.items()})
        self.may_commit()
        # In one piece: a torn one is damage, not a save that was cut off.
        self.directory.publish(MANIFEST, manifest.encode())
        return manifest
