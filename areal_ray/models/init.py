"""Memory and first values for a sharded model that was built on the meta device.

Every module is initialised by its own rules on full-sized tensors, seeded by (seed, name of the module), of which each
rank keeps its part. So the first weights are the same for any world size, mesh and device, and no rank holds more than
one module's weights in full.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give parameters and buffers memory on `device`, with undefined values; tied parameters stay tied."""
    ties: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                ties.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device=device)
    for (first, first_name), *others in ties.values():
        for module, name in others:
            module._parameters[name] = first._parameters[first_name]


def init_weights(model: nn.Module, seed: int) -> None:
    """Set all parameters and buffers of a materialised model.

    Raises:
        ValueError: if a module has parameters but no rule to initialise them.
    """
    _init(model, seed, parameters=True)


def init_buffers(model: nn.Module) -> None:
    """Set the buffers only (rotary frequencies and the like): for a model whose parameters are loaded next."""
    _init(model, seed=0, parameters=False)


def _init(model: nn.Module, seed: int, parameters: bool) -> None:
    done: set[int] = set()
    # The first owner of a shared parameter, in the order of the model's modules, decides how it is initialised.
    for name, module in model.named_modules():
        own = {k: p for k, p in module._parameters.items() if p is not None and id(p) not in done}
        if not ((parameters and own) or module._buffers):
            continue
        with torch.random.fork_rng(devices=[]), _full_sized(module) as full:
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1)
            _apply_rule(model, module, name)
        with torch.no_grad():
            if parameters:
                for key, parameter in own.items():
                    _keep_part(parameter, full[key])
                    done.add(id(parameter))
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    buffer.copy_(full[key])


@contextmanager
def _full_sized(module: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Let a module own, for a moment, full-sized CPU tensors filled with NaN instead of its (sharded) ones."""
    parameters, buffers = module._parameters, module._buffers
    full: dict[str, torch.Tensor] = {}
    for key, tensor in [*parameters.items(), *buffers.items()]:
        if tensor is not None:
            full[key] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            if tensor.dtype.is_floating_point:
                full[key].fill_(torch.nan)
    module._parameters = {
        k: None if p is None else nn.Parameter(full[k], p.requires_grad) for k, p in parameters.items()
    }
    module._buffers = {k: None if b is None else full[k] for k, b in buffers.items()}
    try:
        yield full
        full.update({k: b for k, b in module._buffers.items() if b is not None})
        full.update({k: p.data for k, p in module._parameters.items() if p is not None})
    finally:
        module._parameters, module._buffers = parameters, buffers


def _apply_rule(model: nn.Module, module: nn.Module, name: str) -> None:
    rule = getattr(model, "_init_weights", None)  # transformers: one call per module
    if rule is None:
        rule = getattr(type(module), "reset_parameters", None)
    if rule is None:
        raise ValueError(
            f"module {name!r} ({type(module).__name__}) has parameters or buffers but neither reset_parameters() nor a "
            "model with _init_weights(module): give it a reset_parameters() that sets them"
        )
    rule(module)
    for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and tensor.dtype.is_floating_point and bool(tensor.isnan().any()):
            raise ValueError(f"{name}.{key}: the initialisation of {type(module).__name__} does not set it")


def _keep_part(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Copy this rank's part of a tensor that every rank has; only the part goes to the device."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    mesh, placements = parameter.device_mesh, parameter.placements
    if all(type(placement) in (Shard, Replicate) for placement in placements):
        part = full
        for dim, placement in enumerate(placements):
            if isinstance(placement, Shard):
                part = _chunk(part, placement.dim, mesh.size(dim), mesh.get_local_rank(dim))
        parameter.to_local().copy_(part)
        return
    # Tensor parallelism and FSDP over one dimension: parts that are no slices. src_data_rank=None: nothing is sent.
    parameter.copy_(distribute_tensor(full.to(parameter.device), mesh, placements, src_data_rank=None))


def _chunk(tensor: torch.Tensor, dim: int, count: int, index: int) -> torch.Tensor:
    """One of `count` chunks as DTensor makes them: the last ones may be smaller, or empty."""
    chunks = torch.chunk(tensor, count, dim)
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)
