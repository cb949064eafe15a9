"""The norm of all gradients, and their clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate


def gradient_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> torch.Tensor:
    """The 2-norm of all gradients, a scalar on `device`, the same on every rank. A collective.

    As `torch.nn.utils.clip_grad_norm_` computes it, but for parameters on different meshes too: under tensor
    parallelism some are split over the ranks of a tensor group and others are whole on each of them, to be counted
    once. Of gradients in the host's memory (engine.offload) it is one number that goes to the device, on which the
    ranks add up.
    """
    norms = []
    for group in _by_mesh(parameters):
        if group[0].device.type != device.type:
            norms.append(_norm_of_offloaded(group, device))
            continue
        norm = nn.utils.get_total_norm([parameter.grad for parameter in group if parameter.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _norm_of_offloaded(group: list[nn.Parameter], device: torch.device) -> torch.Tensor:
    """The 2-norm of gradients of one mesh that lie on another device."""
    squares: dict[tuple[bool, ...], list[torch.Tensor]] = {}
    mesh = None
    for parameter in group:
        grad = parameter.grad
        assert isinstance(grad, DTensor)
        mesh, split = grad.device_mesh, tuple(not placement.is_replicate() for placement in grad.placements)
        squares.setdefault(split, []).append(torch.linalg.vector_norm(grad.to_local()).double().square())
    assert mesh is not None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for split, parts in squares.items():
        placements = [Partial() if each else Replicate() for each in split]
        part = torch.stack(parts).sum().to(device)
        total += DTensor.from_local(part, mesh, placements, run_check=False).full_tensor()
    return total.sqrt().float()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None, norm: torch.Tensor) -> None:
    """Scale gradients whose 2-norm is `norm` so that it is at most `limit`; None leaves them as they are."""
    if limit is not None:
        for group in _by_mesh(parameters):
            nn.utils.clip_grads_with_norm_(group, limit, norm)


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters that have a gradient, those of each mesh together."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            found.setdefault(mesh, []).append(parameter)
    return list(found.values())
