"""Shard files: one rank's tensors one after the other, each as `torch.save` writes it.

That is DCP's own file format (torch.distributed.checkpoint.filesystem), so that plain `dcp.load` reads it.
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Sequence
from functools import lru_cache

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from areal_ray.distributed.device import call_runtime


class _WithoutData(io.BytesIO):
    """Receives a `torch.save` under `skip_data`, which seeks past the place of the data: here it takes no room."""

    gap: int | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.gap = self.tell()
        return self.gap


@lru_cache(maxsize=4096)
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """The bytes before and after the data of a contiguous tensor in a file of `torch.save`."""
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        file = _WithoutData()
        with torch.serialization.skip_data():
            torch.save(torch.empty(shape, dtype=dtype), file)
    finally:
        torch.serialization.set_crc32_options(checked)
    blob = file.getvalue()
    return blob[: file.gap], b"" if file.gap is None else blob[file.gap :]


class ShardImage:
    """The image of a shard file in shared memory, laid out once and refilled at every save.

    The memory is an anonymous file: another process of this user can open it by `path`, nobody can leave it behind. It
    is as large as the rank's own state and a few hundred bytes for each tensor. For tensors on a GPU it is pinned;
    where CUDA cannot lock so much, `fill` waits for its copies instead, and `not_pinned` says why.

    Args:
        file_name: under which the image will be stored.
        items: the name of each tensor in DCP's metadata, with an example of its shape, type and device.
        filled: such memory, filled with the same items by another process, which may have ended; to be read only. The
            file descriptor stays the caller's.
        reused: memory of this size that an image had before; the file descriptor is the image's from now on.

    Raises:
        OSError: if there is no memory for it. Nothing is kept then.
    """

    def __init__(
        self,
        file_name: str,
        items: Sequence[tuple[MetadataIndex, torch.Tensor]],
        filled: int | None = None,
        reused: int | None = None,
    ) -> None:
        frames = [frame(tuple(tensor.shape), tensor.dtype) for _, tensor in items]
        self.file_name = file_name
        self.where: dict[MetadataIndex, _StorageInfo] = {}
        self.chunks: list[tuple[int, int]] = []
        self.size = 0
        for (index, tensor), (before, after) in zip(items, frames, strict=True):
            length = len(before) + tensor.nbytes + len(after)
            self.where[index] = _StorageInfo(file_name, self.size, length)
            self.chunks.append((self.size, length))
            self.size += length
        self.tensors: list[torch.Tensor] = []
        self.not_pinned: str | None = None
        self._stream: torch.cuda.Stream | None = None
        self._owns = filled is None
        given = filled if reused is None else reused
        self.fd = os.memfd_create("areal_ray shard image") if given is None else given
        try:
            if filled is None:
                os.ftruncate(self.fd, self.size)
            self._memory = mmap.mmap(self.fd, self.size)
            self._lay_out(items, frames, write=filled is None)
            if filled is None and any(tensor.is_cuda for _, tensor in items):
                self._pin()
        except BaseException:
            self.close()
            raise

    def _lay_out(
        self,
        items: Sequence[tuple[MetadataIndex, torch.Tensor]],
        frames: Sequence[tuple[bytes, bytes]],
        write: bool,
    ) -> None:
        for (offset, length), (_, tensor), (before, after) in zip(self.chunks, items, frames, strict=True):
            if write:
                self._memory[offset : offset + len(before)] = before
                self._memory[offset + length - len(after) : offset + length] = after
            self.tensors.append(self._tensor(offset + len(before), tensor))

    @staticmethod
    def size_of(items: Sequence[tuple[MetadataIndex, torch.Tensor]]) -> int:
        """Bytes of the image of these items."""
        frames = [frame(tuple(tensor.shape), tensor.dtype) for _, tensor in items]
        return sum(
            len(before) + tensor.nbytes + len(after) for (_, tensor), (before, after) in zip(items, frames, strict=True)
        )

    @property
    def path(self) -> str:
        """The path under which a child process can open the memory."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def parts(self) -> list[memoryview]:
        """The bytes of each chunk, not copied."""
        whole = memoryview(self._memory)
        return [whole[offset : offset + length] for offset, length in self.chunks]

    def as_bytes(self) -> torch.Tensor:
        """All bytes as one tensor, not copied."""
        return torch.frombuffer(self._memory, dtype=torch.uint8)

    def fill(self, tensors: Sequence[torch.Tensor], whole: Sequence[bool]) -> torch.cuda.Event | None:
        """Copy the tensors, in the order of the items.

        Args:
            tensors: with the shapes, types and devices of the items.
            whole: which of them are no parts of sharded tensors. Such may be buffers of the model, which change in a
                forward pass already: they are copied before that, on the stream that computes it.

        Returns:
            None when the copy is done; on a GPU an event, before which sharded tensors must not change: they are copied
            on a stream of its own beside the training.
        """
        if self._stream is None:
            for slot, tensor in zip(self.tensors, tensors, strict=True):
                slot.copy_(tensor)
            return None
        pairs = list(zip(self.tensors, tensors, whole, strict=True))
        for slot, tensor, at_once in pairs:
            if at_once:
                slot.copy_(tensor, non_blocking=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for slot, tensor, at_once in pairs:
                if at_once:
                    continue
                slot.copy_(tensor, non_blocking=True)
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)
            done = torch.cuda.Event()
            done.record()
        return done

    def digest(self) -> str:
        """xxh3_128 of all of it."""
        whole = xxhash.xxh3_128()
        whole.update(self._memory)
        return whole.hexdigest()

    def close(self) -> None:
        """Give the memory back."""
        self.tensors.clear()
        try:
            if self._stream is not None:  # or the next memory at this address could not be registered
                self._stream = None
                call_runtime(lambda cuda: cuda.cudaHostUnregister(self._address))
        finally:
            if self._owns:
                self._owns = False
                os.close(self.fd)

    def _tensor(self, start: int, like: torch.Tensor) -> torch.Tensor:
        if not like.numel():
            return torch.empty(like.shape, dtype=like.dtype)
        flat = torch.frombuffer(self._memory, dtype=like.dtype, count=like.numel(), offset=start)
        return flat.view(like.shape)

    def _pin(self) -> None:
        """Register the memory with CUDA, so that copies into it are asynchronous."""
        self._address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        try:
            call_runtime(lambda cuda: cuda.cudaHostRegister(self._address, self.size, 0))
        except RuntimeError as error:  # of locked memory there is less than of any other, see `ulimit -l`
            self.not_pinned = f"CUDA cannot lock {self.size / 1e9:.1f} GB of memory ({error})"
        else:
            self._stream = torch.cuda.Stream()
