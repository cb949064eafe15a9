"""What a load and a save send, compute and hold beside their tensors, by the number of ranks, beside DCP's own.

Real processes over gloo, in a network of their own where this process may make one, so that every byte on its loopback
device is one of theirs. Tensors are small: what is measured is all that is said about them.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from areal_ray.checkpoint import SyncWriter, load
from areal_ray.distributed import Ranks
from areal_ray.storage import LocalStorage

from ..distributed.ranks import run_ranks
from . import report
from .bounds import BUSIEST, CPU, LOAD, PEAK, SECOND, SENT, metadata_of
from .options import Options

RANKS = (2, 4, 8, 16, 32)
TENSORS = 100  # as the titles of the tables say
COLUMNS = 16  # of each tensor; the rows are 4 for each rank
WORK = ("first save", SECOND, LOAD)
ARMS = ("dcp", "areal_ray")
FIGURES = {CPU: ("s", 1), BUSIEST: ("s", 1), SENT: ("KB", 1e3), PEAK: ("MB", 1e6)}


class _Box:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def state_dict(self) -> dict[str, Any]:
        return dict(self._tensors)

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def network_of_our_own() -> bool:
    """Leave the machine's network for one with nothing but a loopback device; whether that worked."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000) != 0:  # CLONE_NEWNET
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0x41)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(control, 0x8914, request)  # SIOCSIFFLAGS
    return True


def _sent() -> int:
    """Bytes that have gone over the loopback device."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def _resident(name: str) -> int:
    """Bytes: VmRSS now, or VmHWM at most since it was set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _measured(work: Callable[[], object]) -> dict[str, float]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    resident = _resident("VmRSS")
    dist.barrier()
    sent, cpu = _sent(), time.process_time()
    work()
    cpu = time.process_time() - cpu
    dist.barrier()
    return {"cpu": cpu, "sent": _sent() - sent, "peak": _resident("VmHWM") - resident}


def of_a_rank(rank: int, arm: str, folder: str) -> dict[str, dict[str, float]]:
    dist.init_process_group("gloo")
    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    tensors: dict[str, torch.Tensor] = {
        f"model.layers.{i}.mlp.weight": DTensor.from_local(torch.full((4, COLUMNS), float(i)), mesh, [Shard(0)])
        for i in range(TENSORS)
    }
    box = {"box": _Box(tensors)}
    ranks, targets = Ranks(), {f"box.{name}": tensor for name, tensor in tensors.items()}
    writer = SyncWriter(ranks)

    def save(name: str) -> None:
        if arm == "dcp":
            dcp.save(targets, checkpoint_id=f"{folder}/{name}")
        else:
            writer.begin(LocalStorage(f"{folder}/{name}"), box, {"step": 1}).result()

    def restore() -> None:
        if arm == "dcp":
            dcp.load(targets, checkpoint_id=f"{folder}/{SECOND}")
        else:
            load(LocalStorage(f"{folder}/{SECOND}"), box, ranks)

    dist.barrier()
    found = {name: _measured(lambda name=name: save(name)) for name in ("first save", SECOND)}  # type: ignore[misc]
    found[LOAD] = _measured(restore)
    writer.close()
    return found


def _of_all(arm: str, count: int) -> dict[str, dict[str, float]]:
    """CPU of the mean rank and of the busiest one, bytes sent for each rank, peak of the rank that needs the most."""
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(of_a_rank, count, arm, folder)
    means = {}
    for work in WORK:
        cpu = [of_rank[work]["cpu"] for of_rank in found]
        sent = max(of_rank[work]["sent"] for of_rank in found)
        peak = max(of_rank[work]["peak"] for of_rank in found)
        means[work] = dict(zip(FIGURES, (sum(cpu) / count, max(cpu), sent / count, peak), strict=True))
    return means


def run(options: Options) -> list[dict]:
    """In a process of its own, which leaves the network."""
    tables = []
    rounds: dict[int, dict[str, list[Any]]] = {}
    with tempfile.NamedTemporaryFile("r") as result:
        # Not as __main__: ranks import the function that they run.
        code = f"from {__name__} import main; main({options.rounds}, {result.name!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
        rounds = {int(count): arms for count, arms in json.load(result).items()}
    for work in WORK:
        for what, (unit, scale) in FIGURES.items():
            for count, arms in rounds.items():
                rows = {arm: [each[work][what] / scale for each in of_arm] for arm, of_arm in arms.items()}
                tables.append(report.show(metadata_of(work, what, count), unit, rows, "dcp"))
    return tables


def main(rounds: int, path: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if not network_of_our_own():
        print("no network of its own could be made: bytes sent are those of the whole machine")
    found: dict[int, dict[str, list[Any]]] = {count: {arm: [] for arm in ARMS} for count in RANKS}
    for number in range(rounds):
        for count in RANKS:
            for arm in Options.order(ARMS, number):
                found[count][arm].append(_of_all(arm, count))
    Path(path).write_text(json.dumps(found))
