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
    is as large as the rank's own state and a few hundred bytes for each tensor.

    Args:
        file_name: under which the image will be stored.
        items: the name of each tensor in DCP's metadata, with an example of its shape, type and device.
        filled: such memory, filled with the same items by another process, which may have ended; to be read only. The
            file descriptor stays the caller's.

    Raises:
        OSError: if there is no memory for it.
        RuntimeError: if CUDA cannot lock so much memory.
    """

    def __init__(
        self, file_name: str, items: Sequence[tuple[MetadataIndex, torch.Tensor]], filled: int | None = None
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
        self.fd = os.memfd_create("areal_ray shard image") if filled is None else filled
        if filled is None:
            os.ftruncate(self.fd, self.size)
        self._memory = mmap.mmap(self.fd, self.size)
        self.tensors: list[torch.Tensor] = []
        for (offset, length), (_, tensor), (before, after) in zip(self.chunks, items, frames, strict=True):
            if filled is None:
                self._memory[offset : offset + len(before)] = before
                self._memory[offset + length - len(after) : offset + length] = after
            self.tensors.append(self._tensor(offset + len(before), tensor))
        self._stream = self._pin() if filled is None and any(tensor.is_cuda for _, tensor in items) else None

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

    def fill(self, tensors: Sequence[torch.Tensor]) -> torch.cuda.Event | None:
        """Copy the tensors, in the order of the items.

        Returns:
            None when the copy is done; on a GPU an event, before which the tensors must not change: the copy runs on a
            stream of its own beside the training.
        """
        if self._stream is None:
            for slot, tensor in zip(self.tensors, tensors, strict=True):
                slot.copy_(tensor)
            return None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for slot, tensor in zip(self.tensors, tensors, strict=True):
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
        if self._stream is not None:  # or the next memory at this address could not be registered
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._address))
        os.close(self.fd)

    def _tensor(self, start: int, like: torch.Tensor) -> torch.Tensor:
        if not like.numel():
            return torch.empty(like.shape, dtype=like.dtype)
        flat = torch.frombuffer(self._memory, dtype=like.dtype, count=like.numel(), offset=start)
        return flat.view(like.shape)

    def _pin(self) -> torch.cuda.Stream:
        """Register the memory with CUDA, so that copies into it are asynchronous."""
        self._address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._address, self.size, 0))
        return torch.cuda.Stream()
