"""Sharding applied to a model, apart from the model and from the engine (after torchtitan's parallelize.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from areal_ray.config import ConfigError, EngineConfig
from areal_ray.distributed.mesh import ParallelDims
from areal_ray.distributed.tensor_parallel import split_tensors, tensor_plan


def parallelize(model: nn.Module, units: Sequence[nn.Module], dims: ParallelDims, config: EngineConfig) -> None:
    """Split tensors, checkpoint activations, compile and shard, in this order.

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
    if config.activation_checkpointing:
        _checkpoint_activations(model)
    if config.compile:
        for unit in units:
            unit.compile()
    policy = MixedPrecisionPolicy()
    if config.precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in reversed(units):  # one may lie in another, and FSDP takes the inner one first
        # Backward begins with the last unit and with the rest: given up, they would be gathered again at once.
        reshard = config.reshard_after_forward and unit is not units[-1]
        fully_shard(unit, mesh=dims.fsdp, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=dims.fsdp, mp_policy=policy, reshard_after_forward=False)


def _checkpoint_activations(model: nn.Module) -> None:
    """Have the model do it its own way: a wrapper module would change the names of the parameters, and so the state."""
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers' name since 5.20, which warns of the other
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)  # type: ignore[operator]
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)  # type: ignore[operator]
    else:
        raise ConfigError("engine.activation_checkpointing", "this model has no gradient_checkpointing_enable()")
