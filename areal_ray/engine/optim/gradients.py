"""The norm of all gradients, and their clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients, a scalar, the same on every rank. A collective.

    As `torch.nn.utils.clip_grad_norm_` computes it, but for parameters on different meshes too: under tensor
    parallelism some are split over the ranks of a tensor group and others are whole on each of them, to be counted
    once.
    """
    norms = []
    for group in _by_mesh(parameters):
        norm = nn.utils.get_total_norm([parameter.grad for parameter in group if parameter.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


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
