"""Saving: the state is copied to host memory, every rank writes its image, rank 0 commits.

The order makes it safe to be killed at any moment: the directory is new, shards are made durable, then what describes
them, then the manifest, without which a directory is not a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint.capture import Capture
from areal_ray.checkpoint.format.manifest import Manifest
from areal_ray.checkpoint.format.shard_file import ShardImage
from areal_ray.distributed import RankError, Ranks
from areal_ray.distributed.device import device_thread
from areal_ray.processes.dcp_pickle import MetadataParts, encode
from areal_ray.processes.file_writer import FileWriter, Record, write_small, write_summed
from areal_ray.storage import Storage


class CheckpointWriter(Protocol):
    """Begins saves. Every method but `fence` is a collective."""

    def prepare(self, state: Mapping[str, Stateful]) -> None:
        """To be called once before training: get ready for the first save beside the first steps, where that helps."""
        ...

    def begin(
        self, directory: Storage, state: Mapping[str, Stateful], info: Mapping[str, Any]
    ) -> Future[Manifest | None]:
        """Take the state as it is now and see to it that it is written.

        Args:
            directory: must not exist.
            state: the objects to save; tensors (plain ones equal on all ranks, DTensors in parts) and plain JSON
                values.
            info: about this save, for the manifest.

        Returns:
            The manifest on rank 0, None elsewhere, when everything is durable and committed; or RankError, on every
            rank.

        Raises:
            Exception: at once, whatever is no outcome that all ranks agreed on, such as a copy that fails on one rank
                (the others wait for it, and it must not train on) or state that is no JSON.
        """
        ...

    def fence(self) -> None:
        """To be called before the state changes next: waits, on the device, for what `begin` still copies."""
        ...

    def close(self) -> None:
        """Finish what is under way and let go of memory and processes."""
        ...


class SyncWriter:
    """Writes and commits before `begin` returns, in this process. Needs host memory as AsyncWriter does.

    Args:
        ranks: all ranks of the job.
        complain: prints a line for the user.
        may_commit: called on rank 0 right before a save is committed; if it raises, the save has failed.
    """

    def __init__(
        self,
        ranks: Ranks,
        complain: Callable[[str], None] = print,
        may_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self._ranks, self._capture, self._files = ranks, Capture(ranks, complain, may_commit), _Here()

    def prepare(self, state: Mapping[str, Stateful]) -> None:
        self._capture.prepare(state)

    def begin(
        self, directory: Storage, state: Mapping[str, Stateful], info: Mapping[str, Any]
    ) -> Future[Manifest | None]:
        return _outcome(lambda: self._capture.take(directory, state, info).finish(self._files, self._ranks))

    def fence(self) -> None: ...

    def close(self) -> None:
        self._capture.close()


class AsyncWriter:
    """Returns when the state is copied; a process beside each rank writes the image, a thread commits.

    One save at a time: `begin` waits for the one before. The memory is that of the rank's own state, once.

    Args:
        ranks: all ranks of the job.
        background: all ranks, over a process group of its own: what a thread sends must not mix with the training's.
        complain: prints a line for the user.
        may_commit: as for SyncWriter; called in that thread.
    """

    def __init__(
        self,
        ranks: Ranks,
        background: Ranks,
        complain: Callable[[str], None] = print,
        may_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self._capture, self._background = Capture(ranks, complain, may_commit), background
        self._thread = device_thread("checkpoint")
        self._file_writer = FileWriter()
        self._file_writer.start()
        self._copied: torch.cuda.Event | None = None
        self._last: Future[Manifest | None] | None = None

    def prepare(self, state: Mapping[str, Stateful]) -> None:
        self._capture.prepare(state)

    def begin(
        self, directory: Storage, state: Mapping[str, Stateful], info: Mapping[str, Any]
    ) -> Future[Manifest | None]:
        if self._last is not None:
            self._last.exception()  # waits; whoever holds the future hears of a failure
        captured = _outcome(lambda: self._capture.take(directory, state, info))
        if captured.exception() is not None:
            return captured
        self._copied = captured.result().copied

        self._last = self._thread.submit(captured.result().finish, _Beside(self._file_writer), self._background)
        return self._last

    def fence(self) -> None:
        if self._copied is not None:
            self._copied.wait()
            self._copied = None

    def close(self) -> None:
        self._thread.shutdown()
        self._file_writer.close()
        self._capture.close()


def save(directory: Storage, state: Mapping[str, Stateful], info: Mapping[str, Any], ranks: Ranks) -> Manifest | None:
    """Write a checkpoint and return when it is committed; arguments as for `CheckpointWriter.begin`.

    Raises:
        RankError: on every rank, if any of them could not write.
    """
    with closing(SyncWriter(ranks)) as writer:
        return writer.begin(directory, state, info).result()


class _Here:
    """Writes files in this process."""

    def __init__(self) -> None:
        self._parts: MetadataParts | None = None
        self._metadata = b""

    def write_image(self, directory: Storage, image: ShardImage) -> dict[str, Record]:
        return write_summed(directory, image.file_name, image.content, image.chunks)

    def write_metadata(self, directory: Storage, name: str, parts: MetadataParts) -> Record:
        if parts is not self._parts:
            self._parts, self._metadata = parts, encode(parts)
        return write_small(directory, name, self._metadata)


class _Beside:
    """Has files written by the process beside this one."""

    def __init__(self, file_writer: FileWriter) -> None:
        self._file_writer = file_writer

    def write_image(self, directory: Storage, image: ShardImage) -> dict[str, Record]:
        return self._file_writer.write(directory, image.file_name, image.path, image.size, image.chunks)

    def write_metadata(self, directory: Storage, name: str, parts: MetadataParts) -> Record:
        return self._file_writer.write_metadata(directory, name, parts)


def _outcome(work: Callable[[], Any]) -> Future[Any]:
    """The outcome of work done now, as a future: a result or RankError, the same on every rank."""
    future: Future[Any] = Future()
    try:
        future.set_result(work())
    except RankError as error:
        future.set_exception(error)
    return future
