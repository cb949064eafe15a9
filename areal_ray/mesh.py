"""From the world size to a device and a DeviceMesh."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from areal_ray.config import Mesh


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


def build_mesh(config: Mesh, device: torch.device) -> DeviceMesh:
    """The mesh of all ranks: ("shard",), or ("replicate", "shard") for HSDP.

    Raises:
        ValueError: if the world size is not replicate x shard.
    """
    world = dist.get_world_size()
    shard = world // config.replicate if config.shard == -1 else config.shard
    if config.replicate * shard != world:
        raise ValueError(f"engine.mesh: replicate x shard = {config.replicate} x {shard}, but there are {world} ranks")
    if config.replicate == 1:
        return init_device_mesh(device.type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (config.replicate, shard), mesh_dim_names=("replicate", "shard"))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
