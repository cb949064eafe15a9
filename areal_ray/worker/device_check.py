"""Check of a worker's GPU: at every start before the model is built, and when an error of the device ends the worker.

A device with damaged memory may compute wrong numbers for days before it fails. The check takes some tens of
milliseconds beyond the CUDA context that is needed anyway, and does not depend on the model or the number of ranks.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Protocol

import torch

from areal_ray.cluster.bad_devices import UUID_UNKNOWN, BadDevice, DeviceName
from areal_ray.worker.nvml import HARDWARE_XIDS, Health, Unknown, open_health

_LIMIT_S = 60.0  # with the CUDA context, which takes seconds when all processes of a node make theirs at once
_ROWS, _DEPTH = 2048, 256  # 256 tiles of 128 x 128: enough for each multiprocessor of the largest devices
_WORDS = 1 << 24  # 64 MiB, of the pattern
# Of an AcceleratorError in training; an illegal access, an assertion and a failed launch are mostly the code's.
_XIDS = "|".join(map(str, sorted(HARDWARE_XIDS)))
_HARDWARE = re.compile(
    rf"uncorrectable|\bECC\b|fell off the bus|GPU is lost|\bXid(?: \([^)]*\))?\W{{1,3}}({_XIDS})\b", re.I
)
# Of the check's own: somebody else has the memory, or the software does not fit.
_NOT_THE_DEVICE = re.compile(
    r"out of memory|ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|no kernel image|driver version|invalid device ordinal"
    r"|forward compatibility",
    re.I,
)
_CUBLAS = "CUBLAS_STATUS_"  # in a plain RuntimeError
# Nor is it any other when CUDA does not start on a GPU that Ray has given out: fallen off the bus, or its driver is.
_NO_START = re.compile(
    r"No CUDA GPUs are available|CUDA unknown error|cudaGetDeviceCount|initialization (failed|error)"
    r"|not yet initialized",
    re.I,
)


class Device(Protocol):
    """One device, as far as the check needs it. Calls wait until the device is done."""

    def select(self) -> None:
        """Make it the current device of the calling thread."""
        ...

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy from the host to new memory of the device."""
        ...

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The matrix product, computed on the device."""
        ...

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy to the host."""
        ...

    def release(self) -> None:
        """Give back memory that is kept for later."""
        ...

    def health(self) -> Health:
        """The driver's view of it; Unknown before the first `select`."""
        ...

    def name(self) -> DeviceName:
        """Its identity, all of it known after the first `select`; also when the device has failed."""
        ...


class CudaDevice:
    """The CUDA device that Ray Train has made this process's own.

    To make it calls nothing of CUDA, which may be what does not work, or hang.

    Args:
        index: of the device, among those that this process sees.
        node: finds name and id of this node; called when something has failed.
        open_health: opens the driver's view of the device with a UUID.
    """

    def __init__(
        self, index: int, node: Callable[[], tuple[str, str]], open_health: Callable[[str], Health] = open_health
    ) -> None:
        self._index, self._node, self._open_health = index, node, open_health
        self._uuid = UUID_UNKNOWN
        self._health: Health | None = None

    def select(self) -> None:
        torch.cuda.set_device(self._index)
        if self._health is None:
            self._uuid = f"GPU-{torch.cuda.get_device_properties(self._index).uuid}"
            self._health = self._open_health(self._uuid)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(f"cuda:{self._index}")

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        result = left @ right
        torch.cuda.synchronize(self._index)
        return result

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()

    def release(self) -> None:
        torch.cuda.empty_cache()

    def health(self) -> Health:
        return self._health or Unknown()

    def name(self) -> DeviceName:
        node, node_id = self._node()
        health = self.health()
        return DeviceName(node, node_id, self._index if health.index is None else health.index, self._uuid, health.pci)


def check(device: Device | None, limit_s: float = _LIMIT_S) -> None:
    """Check the device of this process; nothing without one.

    In a thread of its own, so that a device that does not answer is named and not just a process that is stuck.

    Args:
        device: None on a CPU worker.
        limit_s: after which it counts as bad, in seconds.

    Raises:
        BadDevice: if it is.
        Exception: whatever else the first calls of CUDA raise: it is no fault of the device.
    """
    if device is None:
        return
    ended: list[str | Exception | None] = []

    def run() -> None:
        try:
            ended.append(find_problem(device))
        except Exception as error:  # noqa: BLE001  (raised again below)
            ended.append(error)

    thread = threading.Thread(target=run, name="device check", daemon=True)
    thread.start()
    thread.join(limit_s)
    end = ended[0] if ended else f"it does not answer: the check has not ended in {limit_s:.0f} s"
    if isinstance(end, Exception):
        raise end
    if end is not None:
        raise BadDevice(device.name(), end)


def find_problem(device: Device) -> str | None:
    """Compute with a known result on the device, and ask its driver; what is wrong, None if nothing is."""
    try:
        device.select()
        problems = device.health().problems()
        problem = "; ".join(problems) if problems else _wrong_copy(device) or _wrong_product(device)
        device.release()
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        ours = isinstance(error, torch.AcceleratorError) or _CUBLAS in text or _NO_START.search(text)
        if not ours or _NOT_THE_DEVICE.search(text):
            raise
        problem = f"the check failed: {type(error).__name__}: {text}"
    return problem


def _wrong_copy(device: Device) -> str | None:
    pattern = torch.arange(_WORDS, dtype=torch.int32) * 0x5DEECE6D  # wraps around: all bits change from word to word
    back = device.download(device.upload(pattern))
    wrong = int((back != pattern).sum())
    return f"{wrong} of {_WORDS} words came back changed from its memory" if wrong else None


def _wrong_product(device: Device) -> str | None:
    """Integers up to 8: the product is exact in every precision that a device may take for float32."""
    left = (torch.arange(_ROWS * _DEPTH) * 7 % 17 - 8).float().view(_ROWS, _DEPTH)
    right = (torch.arange(_DEPTH * _ROWS) * 11 % 17 - 8).float().view(_DEPTH, _ROWS)
    expected = left @ right
    on_device = device.upload(left), device.upload(right)
    for _ in range(2):
        wrong = int((device.download(device.product(*on_device)) != expected).sum())
        if wrong:
            return f"{wrong} of {expected.numel()} elements of a matrix product are wrong"
    return None


def blame(device: Device | None, error: Exception) -> Exception:
    """The exception to end a worker with: BadDevice in the place of one that its device is to blame for.

    Args:
        device: None on a CPU worker.
        error: of the worker, annotated (see `cluster.failures.annotate`).
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, torch.AcceleratorError):
        cause = cause.__cause__  # ranks that agree on a failure raise a RankError from it
    if device is None or cause is None:
        return error
    health = device.health()
    found = [f"Xid {xid}" for xid in health.xids() if xid in HARDWARE_XIDS] + health.problems()
    text = " ".join(str(cause).split())[:300]
    if not found and not _HARDWARE.search(text):
        return error
    bad = BadDevice(device.name(), "; ".join([*found, text]))
    bad.__notes__ = error.__notes__
    bad.areal_ray = error.areal_ray  # type: ignore[attr-defined]
    return bad
