"""Shard files: one rank's tensors one after the other, each as `torch.save` writes it.

That is DCP's own file format (torch.distributed.checkpoint.filesystem), so that plain `dcp.load` reads it.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
from collections.abc import Sequence
from functools import lru_cache

import torch
import xxhash

from areal_ray.distributed.device import call_runtime

_MADV_POPULATE_WRITE = 23  # <linux/mman.h>; Python's mmap.madvise would hold the interpreter's lock
_POPULATED = 64 << 20  # bytes in one call
_libc = ctypes.CDLL(None, use_errno=True)


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


def framed_size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a contiguous tensor in a file of `torch.save`."""
    before, after = frame(shape, dtype)
    return len(before) + torch.Size(shape).numel() * dtype.itemsize + len(after)


class ShardImage:
    """The image of a shard file in shared memory, laid out once and refilled at every save.

    The memory is an anonymous file: another process of this user can open it by `path`, nobody can leave it behind. It
    is as large as the rank's own state and a few hundred bytes for each tensor. For tensors on a GPU it is pinned;
    where CUDA cannot lock so much, `fill` waits for its copies instead, and `not_pinned` says why.

    Args:
        file_name: under which the image will be stored.
        items: for each tensor an example of its shape, type and device.
        filled: such memory, filled with the same items by another process, which may have ended; to be read only. The
            file descriptor stays the caller's.
        reused: memory of this size that an image had before; the file descriptor is the image's from now on.

    Raises:
        OSError: if there is no memory for it. Nothing is kept then.
    """

    def __init__(
        self,
        file_name: str,
        items: Sequence[torch.Tensor],
        filled: int | None = None,
        reused: int | None = None,
    ) -> None:
        frames = [frame(tuple(tensor.shape), tensor.dtype) for tensor in items]
        self.file_name = file_name
        self.chunks: list[tuple[int, int]] = []  # bytes of each tensor with its frame, and of what is before its data
        self.size = 0
        for tensor, (before, after) in zip(items, frames, strict=True):
            self.chunks.append((len(before) + tensor.nbytes + len(after), len(before)))
            self.size += self.chunks[-1][0]
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
            if filled is None:
                populate(self._memory)
            self._lay_out(items, frames, write=filled is None)
            if filled is None and any(tensor.is_cuda for tensor in items):
                self._pin()
        except BaseException:
            self.close()
            raise

    def _lay_out(self, items: Sequence[torch.Tensor], frames: Sequence[tuple[bytes, bytes]], write: bool) -> None:
        start = 0
        for tensor, (before, after), (length, _) in zip(items, frames, self.chunks, strict=True):
            end = start + length
            if write:
                self._memory[start : start + len(before)] = before
                self._memory[end - len(after) : end] = after
            self.tensors.append(self._tensor(start + len(before), tensor))
            start = end

    @staticmethod
    def size_of(items: Sequence[torch.Tensor]) -> int:
        """Bytes of the image of these items."""
        return sum(framed_size(tuple(tensor.shape), tensor.dtype) for tensor in items)

    @property
    def path(self) -> str:
        """The path under which a child process can open the memory."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @property
    def content(self) -> memoryview:
        """All bytes, not copied."""
        return memoryview(self._memory)

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


def populate(memory: mmap.mmap) -> None:
    """Have the kernel make all pages of the memory now, in a few calls that hold no lock of the interpreter.

    Otherwise the first copy into it makes them one by one, and takes several times as long as the second.

    Raises:
        OSError: if there is not enough memory.
    """
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    for start in range(0, len(memory), _POPULATED):
        length = min(_POPULATED, len(memory) - start)
        if _libc.madvise(ctypes.c_void_p(address + start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE) != 0:
            error = ctypes.get_errno()
            if error == errno.EINVAL:  # a kernel before 5.14: the first copy it is
                return
            raise OSError(error, f"no memory for {len(memory) / 1e9:.1f} GB: {os.strerror(error)}")
