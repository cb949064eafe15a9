"""Copies from host memory to a GPU through pinned buffers, and threads that work on this rank's GPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_BUFFER = 32 << 20  # bytes of each of the two buffers


class Uploads:
    """Copies to tensors, in the order in which they are asked for; on a GPU beside what the host does meanwhile.

    From ordinary memory a GPU takes 1 to 2 GB/s, as the driver copies it into a buffer of its own first. Here there are
    two, pinned: while one is on its way the other is filled.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._turn = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy; the source may be let go of or changed at once, the target is complete after `wait`.

        Args:
            target: anywhere.
            source: on the CPU, of the same shape and type.
        """
        if not (target.is_cuda and target.is_contiguous() and target.numel()):
            target.copy_(source)
            return
        data, place = _bytes(source.contiguous()), _bytes(target)
        for start in range(0, len(data), _BUFFER):
            part = data[start : start + _BUFFER]
            buffer, done = self._next(target.device)
            buffer = buffer[: len(part)]
            buffer.copy_(part)
            place[start : start + len(part)].copy_(buffer, non_blocking=True)
            done.record(torch.cuda.current_stream(target.device))

    def wait(self) -> None:
        """Wait for all copies."""
        for _, done in self._buffers:
            done.synchronize()

    def _next(self, device: torch.device) -> tuple[torch.Tensor, torch.cuda.Event]:
        """The buffer whose copy was begun earlier, when that is over."""
        if not self._buffers:
            for _ in range(2):
                with torch.cuda.device(device):
                    self._buffers.append((torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))
        self._turn ^= 1
        buffer, done = self._buffers[self._turn]
        done.synchronize()
        return buffer, done


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def device_thread(name: str) -> ThreadPoolExecutor:
    """A pool of one thread, on the GPU of its maker if CUDA has been started.

    CUDA has a present device for each thread, the first one to begin with: a thread of rank 1 that waits for an event
    would open a context on rank 0's GPU.
    """
    if not torch.cuda.is_initialized():
        return ThreadPoolExecutor(1, name)
    return ThreadPoolExecutor(1, name, torch.cuda.set_device, (torch.cuda.current_device(),))


def give_way() -> None:
    """Let this thread have what the others of the machine leave of the cores."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of Linux: a thread has a priority of its own


def call_runtime(call: Callable[[Any], Any]) -> None:
    """Call CUDA's runtime (`torch.cuda.cudart()`) in a thread of its own.

    CUDA remembers the last error of each thread, and the next kernel that this one starts would be blamed for it.

    Raises:
        RuntimeError: if it fails.
    """
    with device_thread("runtime") as thread:
        torch.cuda.check_error(thread.submit(call, torch.cuda.cudart()).result())
