"""From the world size to a device and a DeviceMesh."""

from __future__ import annotations

import math
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from areal_ray.config import MeshConfig


def init_distributed(timeout_s: float, kind: str | None = None) -> torch.device:
    """Join the process group that the launcher (torchrun, Ray Train) describes; alone, make a group of one.

    Args:
        timeout_s: longest wait for the other ranks.
        kind: "cpu" or "cuda"; None takes the GPU where there is one.

    Returns:
        The device of this rank.

    Raises:
        ValueError: if there is no such device.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("a GPU is wanted, but torch finds none: is this a CPU build, or a node without one?")
    device = torch.device("cpu")
    if kind != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Object collectives and checkpoint traffic go over gloo, so a CPU backend is needed beside nccl.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            method = f"tcp://127.0.0.1:{_free_port()}"
            dist.init_process_group(backend, init_method=method, rank=0, world_size=1, timeout=timeout)
    return device


def build_mesh(config: MeshConfig, device: torch.device, timeout_s: float) -> DeviceMesh:
    """The mesh of all ranks, ("replicate", "shard", "tensor"); of these only "shard" is there with size 1.

    The ranks of a tensor group are neighbours: they exchange the most, and belong on one machine.

    Args:
        config: sizes.
        device: of this rank.
        timeout_s: longest wait of a rank for the others of one dimension.

    Raises:
        ValueError: if the world size is not replicate x shard x tensor.
    """
    world, others = dist.get_world_size(), config.replicate * config.tensor
    sizes = {
        "replicate": config.replicate,
        "shard": max(1, world // others) if config.shard == -1 else config.shard,
        "tensor": config.tensor,
    }
    if math.prod(sizes.values()) != world:
        product = " x ".join(map(str, sizes.values()))
        raise ValueError(f"engine.mesh: {' x '.join(sizes)} = {product}, but there are {world} ranks")
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    groups = mesh.get_all_groups()
    if "tensor" in sizes:
        # DTensor finds this one and sums over both at once, where it would sum over one and then over the other.
        groups.append(mesh["shard", "tensor"]._flatten().get_group())
        groups.append(data_parallel(mesh)._flatten().get_group())
    for group in groups:  # made with the backend's own limit, half an hour for gloo
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
    return mesh


def data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    """The part of the mesh whose ranks have different rows of a batch: this rank's, without "tensor"."""
    names = mesh.mesh_dim_names or ()
    return mesh[tuple(name for name in names if name != "tensor")] if "tensor" in names else mesh


def data_parallel_group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The ranks of `data_parallel` in one group, in the order of their rows; None: all ranks."""
    across = data_parallel(mesh)
    return None if across is mesh else across._flatten().get_group()  # that of build_mesh, no new one


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
