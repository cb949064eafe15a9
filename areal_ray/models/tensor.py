"""Which modules tensor parallelism splits, and how: the model's own plan, checked before anything is started."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from areal_ray.config import ConfigError

_KEY = "engine.mesh.tensor"
# Dimension of the weight that each of transformers' styles splits; None: every rank keeps the whole weight.
_SPLITS: dict[str, int | None] = {
    "colwise": 0,
    "colwise_gather_output": 0,
    "colwise_rep": 0,  # the older name of colwise_gather_output
    "rowwise": 1,
    "rowwise_split_input": 1,
    "rowwise_rep": 1,  # the older name of rowwise_split_input
    "embedding_rowwise": 0,
    "embedding_colwise": 1,
    "replicated_with_grad_allreduce": None,
}
# How a module of that type splits that dimension of its weight when input and output are whole on every rank.
_WHOLE_OUTSIDE = {
    (nn.Linear, 0): "colwise_gather_output",
    (nn.Linear, 1): "rowwise_split_input",
    (nn.Embedding, 0): "embedding_rowwise",
    (nn.Embedding, 1): "embedding_colwise",
}


def tensor_plan(model: nn.Module, size: int) -> dict[str, str]:
    """The tensor-parallel style of each module that has one, by the module's name.

    The plan is that of transformers (`model.tp_plan`: `_tp_plan` of the class, `base_model_tp_plan` of the config). A
    module that shares its weight with a planned one (tied embeddings) gets the style that splits it in the same way.

    Args:
        model: as built; a factory's model may have a `tp_plan` too, patterns with `*` for layer numbers to styles.
        size: ranks in a tensor group.

    Raises:
        ConfigError: if the model has no plan, or one with a style that is not known here, or cannot be split by `size`.
    """
    rules: Mapping[str, str] = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None) or {}
    name = type(model).__name__
    if not rules:
        raise ConfigError(_KEY, f"{name} has no tensor-parallel plan; 1 works with every model")
    if unknown := sorted(set(rules.values()) - set(_SPLITS)):
        known = ", ".join(_SPLITS)
        raise ConfigError(_KEY, f"the plan of {name} has the style {unknown[0]!r}, which is none of {known}")

    def rule(of: str) -> str | None:
        return rules.get(of) or rules.get(re.sub(r"\d+", "*", of))

    if bare := [parameter for parameter, _ in model.named_parameters() if rule(parameter)]:
        raise ConfigError(_KEY, f"the plan of {name} splits the bare parameter {bare[0]}, which is not supported")
    plan = {module: style for module, _ in model.named_modules() if (style := rule(module)) is not None}
    if not plan:
        raise ConfigError(_KEY, f"the tensor-parallel plan of {name} names none of its modules: {', '.join(rules)}")
    _check_types(model, plan)
    plan |= _tied(model, plan)
    _check_sizes(model, plan, size)
    return plan


def _check_types(model: nn.Module, plan: Mapping[str, str]) -> None:
    for name, style in plan.items():
        module, wanted = model.get_submodule(name), nn.Embedding if style.startswith("embedding") else nn.Linear
        if _SPLITS[style] is not None and not isinstance(module, wanted):
            what = f"{name} is a {type(module).__name__}, and {style!r} splits a {wanted.__name__}"
            raise ConfigError(_KEY, f"the plan of {type(model).__name__} cannot be used: {what}")


def _tied(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Styles for modules that share a weight with a planned one."""
    split = {id(model.get_parameter(f"{name}.weight")): _SPLITS[style] for name, style in plan.items()}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        dim = split.get(id(module._parameters.get("weight")))
        if dim is None:
            continue
        if name not in plan:
            style = next((s for (kind, d), s in _WHOLE_OUTSIDE.items() if isinstance(module, kind) and d == dim), None)
            if style is None:
                raise ConfigError(_KEY, f"{name} shares its weight with a module that is split, and cannot be split")
            found[name] = style
        elif _SPLITS[plan[name]] != dim:
            raise ConfigError(
                _KEY, f"the plan of {type(model).__name__} splits the shared weight of {name} in two ways"
            )
    return found


def _check_sizes(model: nn.Module, plan: Mapping[str, str], size: int) -> None:
    for name, style in plan.items():
        dim = _SPLITS[style]
        if dim is not None and (length := model.get_parameter(f"{name}.weight").shape[dim]) % size:
            raise ConfigError(_KEY, f"{size} does not divide {length}, the size of dimension {dim} of {name}.weight")
    # A rank that has a part of a head cannot compute attention.
    if not any(style == "colwise" and re.search(r"att", name) for name, style in plan.items()):
        return
    config = getattr(model, "config", None)
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if isinstance(heads, int) and heads % size:
            raise ConfigError(_KEY, f"{size} does not divide {key}={heads}: every rank needs whole heads")
