"""Tensor parallelism: a model's plan carried out with torch.distributed.tensor.parallel."""

from __future__ import annotations

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


def split_tensors(model: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Split the planned modules' weights over a mesh; outside of them activations and parameters stay plain tensors.

    Parameters without a plan (norms, biases after a sum) are whole on every rank. All ranks of the mesh compute the
    same gradient for them, so they stay equal without being sent.

    Args:
        model: on the meta device; its tied parameters stay tied.
        plan: style by module name, see `models.tensor_plan`.
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
