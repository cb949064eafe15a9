"""Device, process group and mesh of a rank."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from areal_ray.config import MeshConfig

_GLOO_THREAD = "pt_gloo_runloop"  # as torch names them
_LOOKS = 3  # at which all of them sleep


def init_distributed(
    timeout_s: float, kind: str | None = None, entering: Callable[[str], None] = lambda _: None
) -> torch.device:
    """Join the process group that the launcher (torchrun, Ray Train) describes; alone, make a group of one.

    A launcher that has made the group has chosen the device, too (Ray Train: `torch.cuda.set_device`), and it is kept.

    Args:
        timeout_s: longest wait for the other ranks.
        kind: "cpu" or "cuda"; None takes the GPU where there is one.
        entering: told of the phase that begins, see `connect`.

    Returns:
        The device of this rank.

    Raises:
        ValueError: if there is no such device.
        RuntimeError: if the ranks do not reach each other.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("a GPU is wanted, but torch finds none: is this a CPU build, or a node without one?")
    device = torch.device("cpu")
    if kind != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", _local_gpu())
        torch.cuda.set_device(device)
    gpu = device if device.type == "cuda" else None
    if dist.is_initialized():
        world = dist.group.WORLD
        assert world is not None
        connect("all ranks", world, device, entering)
        if gpu is not None and world.bound_device_id is None:
            # Now that it is connected: groups of some ranks are split off its communicator, where they would otherwise
            # each find their members by themselves.
            world.bound_device_id = gpu
        return device
    # Object collectives and checkpoint traffic go over gloo, so a CPU backend is needed beside nccl.
    backend = "cpu:gloo,cuda:nccl" if gpu is not None else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=gpu)
    else:
        method = f"tcp://127.0.0.1:{_free_port()}"
        dist.init_process_group(backend, init_method=method, rank=0, world_size=1, timeout=timeout, device_id=gpu)
    connect("all ranks", dist.group.WORLD, device, entering)
    return device


def leave_distributed(limit_s: float = 10.0) -> None:
    """End the process group, and wait until gloo's threads are at rest: this process may end then.

    They tell who waits for a collective that it is done before they let go of its tensors. Where a busy machine has
    Python end in between, the last reference to a tensor aborts the process: "terminate called without an active
    exception" (torch: `ProcessGroupGloo::runLoop`, which takes the lock of an interpreter that is gone).

    Args:
        limit_s: longest wait.
    """
    dist.destroy_process_group()
    until, looks = time.monotonic() + limit_s, 0
    while looks < _LOOKS and time.monotonic() < until:
        looks = 0 if _gloo_is_busy() else looks + 1
        time.sleep(0.001)  # in which a thread gets the lock, if it was that for which it slept


def _gloo_is_busy() -> bool:
    for task in Path("/proc/self/task").glob("*/stat"):  # of Linux; elsewhere there is nothing to be seen
        with suppress(OSError):  # a thread that has ended
            name, _, state = task.read_text(errors="replace").partition("(")[2].rpartition(") ")
            if name == _GLOO_THREAD and not state.startswith("S"):  # sleeping
                return True
    return False


def _local_gpu() -> int:
    """Index of this rank's GPU among those that the process sees."""
    if dist.is_initialized():
        return torch.cuda.current_device()
    count, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if count == 1:  # each process is shown its own, or it is the only one
        return 0
    if local >= count:
        raise ValueError(f"rank {local} of this node (LOCAL_RANK) has no GPU of its own: it sees {count}")
    return local


def connect(
    name: str, group: dist.ProcessGroup | None, device: torch.device, entering: Callable[[str], None] = lambda _: None
) -> None:
    """Sum a number over a group's ranks, so that its connections are made here and not in the first step.

    NCCL makes a communicator with the group's first collective, and that is where a network that is set up wrongly
    hangs. Waits for the device.

    Args:
        name: of the group, for the message.
        group: the group.
        device: of this rank.
        entering: told of the phase "connect NAME" before: with NCCL a hang ends the process without an exception.

    Raises:
        RuntimeError: if it fails; over gloo also if it takes longer than the group's time limit.
    """
    entering(f"connect {name}")
    try:
        total = torch.ones(1, device=device)
        dist.all_reduce(total, group=group)
        there = int(total)
    except RuntimeError as error:
        raise RuntimeError(f"{name} of the mesh cannot reach each other: {error}") from error
    assert there == dist.get_world_size(group), (name, there)


def _set_timeout(limit: timedelta, group: dist.ProcessGroup) -> None:
    """`torch.distributed.set_timeout`, which torch has since 2.14; the older name prints a warning there."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(limit, group)


@dataclass(frozen=True)
class ParallelDims:
    """Parallel dimensions: the one place that knows the names of the mesh's dimensions, and which ranks share what.

    After torchtitan's class of that name.

    Args:
        mesh: of all ranks, ("replicate", "shard", "tensor"); of these only "shard" is there with size 1.
        fsdp: the part over which parameters are sharded and replicated, and over which rows of a batch differ.
        tensor: the ranks that compute one layer together; None if each computes its own.
        batch_group: the ranks of `fsdp` in one group, in the order of their rows; None: all ranks. Losses and their
            weights are summed over it.
    """

    mesh: DeviceMesh
    fsdp: DeviceMesh
    tensor: DeviceMesh | None
    batch_group: dist.ProcessGroup | None

    @staticmethod
    def build(
        config: MeshConfig, device: torch.device, timeout_s: float, entering: Callable[[str], None] = lambda _: None
    ) -> ParallelDims:
        """Lay a mesh over all ranks. The ranks of a tensor group are neighbours: they exchange the most.

        Args:
            config: sizes.
            device: of this rank.
            timeout_s: longest wait of a rank for the others of one dimension.
            entering: told of the phase that begins, see `connect`.

        Raises:
            ValueError: if the world size is not replicate x shard x tensor.
        """
        sizes = _sizes(config, dist.get_world_size())
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        groups, fsdp, tensor, batch_group = mesh.get_all_groups(), mesh, None, None
        if "tensor" in sizes:
            fsdp, tensor = mesh[tuple(name for name in sizes if name != "tensor")], mesh["tensor"]
            batch_group = fsdp._flatten().get_group()
            # DTensor finds this one and sums over both at once, where it would sum over one and then over the other.
            groups += [mesh["shard", "tensor"]._flatten().get_group(), batch_group]
        for group in groups:  # made with the backend's own limit, half an hour for gloo
            _set_timeout(timedelta(seconds=timeout_s), group)
        dims = ParallelDims(mesh, fsdp, tensor, batch_group)
        for name, size in dims.sizes().items():
            connect(f"the {size} ranks of dimension {name}", mesh.get_group(name), device, entering)
        if batch_group is not None:
            connect("the ranks that share a batch", batch_group, device, entering)
        return dims

    @property
    def batch_rank(self) -> int:
        """This rank's part of a global batch, and its place in the random numbers: the same within a tensor group."""
        return dist.get_rank(self.batch_group)

    @property
    def batch_size(self) -> int:
        """The number of parts that a global batch is cut into."""
        return dist.get_world_size(self.batch_group)

    @property
    def only_shards(self) -> bool:
        """Whether parameters are sharded over all ranks, and nothing else is done to them."""
        return self.mesh.ndim == 1

    def sizes(self) -> dict[str, int]:
        """Ranks of each dimension, by its name, for manifests and the screen."""
        return dict(zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=True))


def _sizes(config: MeshConfig, world: int) -> dict[str, int]:
    others = config.replicate * config.tensor
    sizes = {
        "replicate": config.replicate,
        "shard": max(1, world // others) if config.shard == -1 else config.shard,
        "tensor": config.tensor,
    }
    if math.prod(sizes.values()) != world:
        product = " x ".join(map(str, sizes.values()))
        raise ValueError(f"engine.mesh: {' x '.join(sizes)} = {product}, but there are {world} ranks")
    return {name: size for name, size in sizes.items() if size > 1 or name == "shard"}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
