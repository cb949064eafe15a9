"""Shard units: the modules whose parameters are sharded, gathered and freed as one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from areal_ray.config import ConfigError


def shard_units(model: nn.Module, class_names: Sequence[str] = ()) -> list[nn.Module]:
    """The decoder layers, in the order of the model.

    Args:
        model: the whole model; it is a unit of its own and not in the list.
        class_names: names of the units' classes; by default those that transformers says not to split.

    Raises:
        ConfigError: if a named class does not occur in the model.
    """
    wanted = set(class_names) or set(getattr(model, "_no_split_modules", None) or ())
    units = [module for module in model.modules() if type(module).__name__ in wanted and module is not model]
    missing = set(class_names) - {type(unit).__name__ for unit in units}
    if missing:
        raise ConfigError("model.shard_units", f"the model has no module of class {', '.join(sorted(missing))}")
    return units
