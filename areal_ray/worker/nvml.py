"""What the driver knows of a GPU's health, through NVML where it is installed (the extra `gpu`: nvidia-ml-py).

Sources: the NVML API reference (nvmlDeviceGetTotalEccErrors, nvmlDeviceGetRemappedRows, nvmlEventSetWait), and NVIDIA's
"Xid Errors" and "GPU Memory Error Management".
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

# Xid errors of the hardware: double-bit ECC error, row remapping (or page retirement) and its failure, NVLink, fallen
# off the bus, too many single-bit errors, contained and uncontained ECC errors.
HARDWARE_XIDS = frozenset({48, 63, 64, 74, 79, 92, 94, 95})


class Health(Protocol):
    """The driver's view of one GPU."""

    index: int | None
    pci: str

    def problems(self) -> list[str]:
        """What makes it unfit, by its counters of errors."""
        ...

    def xids(self) -> list[int]:
        """Xid errors since the last call, or since this object was made."""
        ...


class Unknown:
    """Nothing is known, for want of NVML."""

    index: int | None = None
    pci = ""

    def problems(self) -> list[str]:
        return []

    def xids(self) -> list[int]:
        return []


class Nvml:
    """The driver's view through NVML. What a device does not support is left out: consumer cards have no ECC.

    Args:
        nvml: the module pynvml, initialised.
        handle: of the device.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.index: int | None = self._ask(lambda: int(nvml.nvmlDeviceGetIndex(handle)))
        self.pci: str = self._ask(lambda: _text(nvml.nvmlDeviceGetPciInfo(handle).busId)) or ""
        self._events = self._ask(self._register)

    def problems(self) -> list[str]:
        nvml, handle, found = self._nvml, self._handle, []
        uncorrected, volatile = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        if count := self._ask(lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, uncorrected, volatile)):
            found.append(f"{count} uncorrected ECC errors since its last reset")
        _, _, pending, failed = self._ask(lambda: nvml.nvmlDeviceGetRemappedRows(handle)) or (0, 0, 0, 0)
        if failed:
            found.append("a row of its memory could not be remapped: it is to be replaced")
        if pending:
            found.append("a row of its memory waits to be remapped: it is to be reset")
        if self._ask(lambda: nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle)):
            found.append("a page of its memory waits to be retired: it is to be reset")
        return found

    def xids(self) -> list[int]:
        found: list[int] = []
        while self._events is not None:
            event = self._ask(lambda: self._nvml.nvmlEventSetWait_v2(self._events, 0))
            if event is None:  # nothing more has happened
                break
            found.append(int(event.eventData))
        return found

    def _register(self) -> Any:
        events = self._nvml.nvmlEventSetCreate()
        self._nvml.nvmlDeviceRegisterEvents(self._handle, self._nvml.nvmlEventTypeXidCriticalError, events)
        return events

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer; None if this device has none."""
        try:
            return question()
        except self._nvml.NVMLError:  # not supported, not permitted in this container, timed out
            return None


def open_health(uuid: str, load: Callable[[str], Any] = import_module) -> Health:
    """Open the driver's view of a device; Unknown without NVML, or if it does not know the device (a MIG slice).

    Args:
        uuid: "GPU-...".
        load: imports a module.
    """
    try:
        nvml = load("pynvml")
    except ImportError:
        return Unknown()
    try:
        nvml.nvmlInit()
        return Nvml(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
    except nvml.NVMLError:
        return Unknown()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
