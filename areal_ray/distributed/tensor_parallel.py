"""Tensor parallelism: a model's plan carried out with torch.distributed.tensor.parallel."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

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


def split_tensors(model: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Split the planned modules' weights over a mesh; outside of them activations and parameters stay plain tensors.

    Parameters without a plan (norms, biases after a sum) are whole on every rank. All ranks of the mesh compute the
    same gradient for them, so they stay equal without being sent.

    Args:
        model: on the meta device; its tied parameters stay tied.
        plan: style by module name, see `tensor_plan`.
        mesh: of one dimension, the ranks of a tensor group.
    """
    # The logits are then a view of a DTensor's part; that they must not be changed in place stands in TrainEngine.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    ties = _ties(model)
    styles = {name: _style(style) for name, style in plan.items()}
    for style in styles.values():
        style.src_data_rank = None  # nothing to send: the weights have no values yet
    parallelize_module(model, mesh, styles)
    # Each module was given a parameter of its own.
    for (first, key), *others in ties:
        for module, name in others:
            module.register_parameter(name, first._parameters[key])


def _style(name: str) -> ParallelStyle:
    whole = Replicate()
    if name == "colwise":
        return ColwiseParallel()
    if name == "rowwise":
        return RowwiseParallel()
    if name in ("rowwise_split_input", "rowwise_rep", "embedding_rowwise"):
        return RowwiseParallel(input_layouts=whole)
    if name == "replicated_with_grad_allreduce":
        # A norm over each rank's own heads: a whole weight whose gradient is a sum over the ranks. That is what torch
        # calls sequence parallel; which dimension counts as split is all the same to a norm over the last one.
        return SequenceParallel(sequence_dim=0, use_local_output=True)
    assert name in ("colwise_gather_output", "colwise_rep", "embedding_colwise"), name
    return ColwiseParallel(output_layouts=whole)


def _ties(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places of each parameter that has more than one."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return [group for group in places.values() if len(group) > 1]
