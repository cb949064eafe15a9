"""Peaks of a device: its rate, by its name, and the memory that this process has taken of it."""

from __future__ import annotations

import re
import resource

import torch

# Dense TFLOP/s in bfloat16, TF32 and float32 by words in the device's name, the first that fits, from the data sheets
# of NVIDIA and AMD.
_PEAKS = {
    "B200": (2250.0, 1125.0, 75.0), "H200 NVL": (835.0, 417.0, 60.0), "H200": (989.0, 494.0, 67.0),
    "GH200": (989.0, 494.0, 67.0), "H100 NVL": (835.0, 417.0, 60.0), "H100 PCIe": (756.0, 378.0, 51.0),
    "H100": (989.0, 494.0, 67.0), "A100": (312.0, 156.0, 19.5), "L40S": (362.0, 183.0, 91.6),
    "L40": (181.0, 90.5, 90.5), "L4": (121.0, 60.0, 30.3), "A10": (125.0, 62.5, 31.2), "A40": (149.7, 74.8, 37.4),
    "MI300X": (1307.0, 653.0, 163.0),
}  # fmt: skip


def peak_tflops(name: str, precision: str = "bfloat16", tf32: bool = False) -> float | None:
    """TFLOP/s of a device of that name; None if it is in no list, as a part of one (MIG) is.

    Args:
        name: as the driver says it, "NVIDIA H100 80GB HBM3".
        precision: of the computation: bfloat16 or float32.
        tf32: whether products of float32 are computed as TF32.
    """
    if "MIG" in name:
        return None
    found = next((peaks for part, peaks in _PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
    return None if found is None else found[0 if precision == "bfloat16" else 1 if tf32 else 2]


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has taken since it was started; waits for nothing.

    On a GPU that of torch's allocator, with what it keeps; on a CPU the resident set, which for a forked process begins
    with what it shares with its parent.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
