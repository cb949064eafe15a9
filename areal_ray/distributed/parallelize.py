"""Sharding applied to a model, apart from the model and from the engine (after torchtitan's parallelize.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from areal_ray.config import EngineConfig
from areal_ray.distributed.mesh import ParallelDims
from areal_ray.distributed.recompute import innermost, recompute_activations
from areal_ray.distributed.tensor_parallel import split_tensors, tensor_plan

BACKEND = "inductor"  # of torch.compile


def parallelize(model: nn.Module, units: Sequence[nn.Module], dims: ParallelDims, config: EngineConfig) -> None:
    """Split tensors, checkpoint activations, shard and compile, in this order.

    Each unit is sharded by itself, and then the rest as one.

    Args:
        model: on the meta device.
        units: modules that are gathered one at a time.
        dims: of the mesh that it is laid over.

    Raises:
        ConfigError: if the model cannot do what the config asks for.
    """
    if dims.tensor is not None:
        split_tensors(model, tensor_plan(model, dims.tensor.size()), dims.tensor)
    recompute_activations(model, units, config.recomputed)
    policy = MixedPrecisionPolicy()
    if config.precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # Pinned memory, from which a unit is copied to the GPU beside the computation of the one before it.
    pinned = dims.mesh.device_type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pinned) if config.offload == "all" else OffloadPolicy()
    how: dict[str, Any] = {"mesh": dims.fsdp, "mp_policy": policy, "offload_policy": offload}
    for unit in reversed(units):  # one may lie in another, and FSDP takes the inner one first
        # Backward begins with the last unit and with the rest: given up, they would be gathered again at once.
        reshard = config.reshard_after_forward and unit is not units[-1]
        fully_shard(unit, reshard_after_forward=reshard, **how)
    fully_shard(model, reshard_after_forward=False, **how)
    if config.compile:
        _compile(units)


def _compile(units: Sequence[nn.Module]) -> None:
    """Compile what each unit computes, and not what FSDP does before and after it: the hooks stay outside.

    After sharding, which gives units another class, and so transformers' layers another `forward`. Names of parameters
    stay, as no module is wrapped. A unit that holds another one stays as it is, as it would be cut there.
    """
    for unit in innermost(units):
        unit.forward = torch.compile(unit.forward, backend=BACKEND)
