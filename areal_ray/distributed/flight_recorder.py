"""The collectives that ranks have entered, by NCCL's flight recorder, and which rank is late.

Where ranks wait for each other each of them stands in a collective, or beside one whose kernel does not end, and none
looks like the cause. The recorder of each knows how many collectives of every group it has entered: the late one fewer.
It keeps some if TORCH_NCCL_TRACE_BUFFER_SIZE (TORCH_FR_BUFFER_SIZE) says so when the first group is made. See "Flight
Recorder for Debugging Stuck Jobs" in PyTorch's documentation.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch

Entered = dict[str, tuple[int, str]]  # by group: sequence number of the last collective and its operation


def dump() -> bytes | None:
    """The recorder's dump, without stacks; None in a build without NCCL. Waits for nothing on the device."""
    recorder = getattr(getattr(torch._C, "_distributed_c10d", None), "_dump_nccl_trace", None)
    return None if recorder is None else recorder(includeCollectives=True, includeStackTraces=False, onlyActive=False)


def entered(trace: bytes) -> Entered:
    """The last collective of each group that this rank has entered.

    Args:
        trace: dump of this process.
    """
    last: Entered = {}
    entries: list[dict[str, Any]] = pickle.loads(trace).get("entries", [])  # noqa: S301  (made by this process)
    for entry in entries:
        group, number = ":".join(map(str, entry["process_group"])), entry.get("collective_seq_id", 0)
        if not entry.get("is_p2p") and number >= last.get(group, (0, ""))[0]:
            last[group] = number, str(entry["profiling_name"]).rpartition(":")[2]
    return last


def late_rank(ranks: Mapping[int, Mapping[str, Any]]) -> tuple[int, str] | None:
    """The rank that the others wait for, and a sentence about it; None if all have entered the same collectives.

    Args:
        ranks: what each rank has entered, as `entered` gives it; of the ranks of the job that could say it.
    """
    for group in sorted({name for seen in ranks.values() for name in seen}):
        numbers = {rank: seen[group][0] for rank, seen in sorted(ranks.items()) if group in seen}
        first, last = min(numbers.values()), max(numbers.values())
        behind = [rank for rank, number in numbers.items() if number == first]
        if first < last and len(behind) < len(numbers):
            operation = next(seen[group][1] for seen in ranks.values() if group in seen and seen[group][0] == last)
            others = f", as {len(behind) - 1} more" if len(behind) > 1 else ""
            where = f"{operation} {last} of group {group.partition(':')[2] or group}"
            return behind[0], f"has entered {first} collectives{others}, and the others wait in {where}"
    return None
