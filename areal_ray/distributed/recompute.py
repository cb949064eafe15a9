"""Activation checkpointing: activations of some units are not kept for the backward pass, but computed again in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from areal_ray.config import ConfigError, Recomputed

_KEY = "engine.activation_checkpointing"

# What `selective` keeps: products with weights, attention, and what ranks have sent each other for them. Not bmm, the
# product of two activations: eager attention makes its scores with it, which grow with the square of the sequence.
# After torchtitan's list; by name, as not every torch has all of them.
_KEPT = (
    "aten.mm.default",
    "aten.addmm.default",
    "aten._grouped_mm.default",
    "aten._scaled_mm.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_fused_attention_overrideable.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "_c10d_functional.all_reduce.default",
    "_c10d_functional.reduce_scatter_tensor.default",
    "_c10d_functional.all_gather_into_tensor.default",
)


def recompute_activations(model: nn.Module, units: Sequence[nn.Module], how: Recomputed) -> None:
    """Have units compute their activations again in the backward pass; loss and gradients keep every bit.

    A model of transformers does it its own way, which also keeps caches out; of any other the `forward` of its units
    is put into `torch.utils.checkpoint`. No module is wrapped, as that would change the names of the parameters, and so
    the state. The hooks of FSDP stay outside: nothing is gathered twice for it.

    Each unit without its activations costs a second forward pass of it, and keeps its input alone: rows x sequence x
    width in the format of the computation. With `how.keeps_products` only what is cheap is computed again.

    Args:
        model: on the meta device, not sharded yet.
        units: its layers, in the order in which they are computed.
        how: which units, and what is kept of them.

    Raises:
        ConfigError: if the model has no units, or cannot leave out some of them.
    """
    if not how.every:
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if how.keeps_products:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy(frozenset(_kept_operations())))
    # transformers' name since 5.20, which warns of the other
    enable = getattr(model, "activation_checkpointing_enable", getattr(model, "gradient_checkpointing_enable", None))
    if enable is None:
        _recompute_forward(units, how.every, settings)
        return
    try:
        enable(settings)
    except ValueError as error:
        raise ConfigError(_KEY, f"is not for this model: {error}") from None
    _leave_out(model, how.every)


def innermost(units: Sequence[nn.Module]) -> list[nn.Module]:
    """The units that hold no other one."""
    every = set(units)
    return [unit for unit in units if not any(module in every for module in unit.modules() if module is not unit)]


def _leave_out(model: nn.Module, every: int) -> None:
    """Switch it off again in all layers of a transformers model but each `every`-th."""
    flagged = [
        module for module in model.modules() if isinstance(getattr(module, "gradient_checkpointing", None), bool)
    ]
    layers = innermost(flagged)
    if every > 1 and len(layers) < 2:
        raise ConfigError(_KEY, "must be none, full or selective: this model's layers cannot be told apart")
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0  # type: ignore[assignment]


def _recompute_forward(units: Sequence[nn.Module], every: int, settings: dict[str, Any]) -> None:
    chosen = innermost(units)[::every]
    if not chosen:
        raise ConfigError(_KEY, "the model has no units that could be computed again: name them in model.shard_units")
    for unit in chosen:
        unit.forward = _again(unit, unit.forward, settings)


def _again(unit: nn.Module, forward: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    @wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not unit.training:
            return forward(*args, **kwargs)
        return checkpoint(partial(forward, **kwargs), *args, **settings)

    return checkpointed


def _policy(kept: frozenset[Any]) -> Callable[..., CheckpointPolicy]:
    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _kept_operations() -> Iterator[Any]:
    for name in _KEPT:
        found: Any = torch.ops
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            yield found
