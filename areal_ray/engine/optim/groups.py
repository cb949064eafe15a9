"""Parameter groups: rate and decay by the names of the parameters, and what is not trained at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from areal_ray.config import ConfigError, OptimConfig, ParameterGroupConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups as torch's optimizers take them: params, lr and weight_decay.

    The first of `optim.groups` whose pattern is found in a parameter's name applies to it. Without one, matrices decay
    and vectors (norms, biases) do not.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = next((group for group in config.groups if re.search(group.pattern, name)), None)
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        if own is not None and own.weight_decay is not None:
            decay = own.weight_decay
        found.setdefault((config.lr * (own.lr_scale if own else 1.0), decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in found.items()]


def freeze(model: nn.Module, groups: Sequence[ParameterGroupConfig]) -> None:
    """Switch off the gradients of the parameters that groups freeze; to be called before sharding.

    Raises:
        ConfigError: if a group's pattern is found in no name, or nothing is left to be trained.
    """
    names = [name for name, _ in model.named_parameters()]
    for i, group in enumerate(groups):
        if not any(re.search(group.pattern, name) for name in names):
            text = f"{group.pattern!r} is found in no parameter's name; the first of them are {', '.join(names[:3])}"
            raise ConfigError(f"optim.groups[{i}].pattern", text)
    for name, parameter in model.named_parameters():
        own = next((group for group in groups if re.search(group.pattern, name)), None)
        if own is not None and own.freeze:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("optim.groups", "freeze every parameter: nothing is left to be trained")
