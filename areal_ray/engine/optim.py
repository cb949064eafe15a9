"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from areal_ray.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, 2019); matrices decay, vectors (norms, biases) do not.

    The state (step, exp_avg, exp_avg_sq) is made at once: a run that does not fit into memory says so at its start,
    and a save before the first step has the same keys as any other.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    _make_state(optimizer)
    return optimizer


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Run one step that changes nothing (zero gradients, zero rate), then take it off the step counters again."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        state["step"].zero_()


def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float | None) -> torch.Tensor:
    """Scale gradients so that their norm is at most `limit`. A collective.

    As `torch.nn.utils.clip_grad_norm_`, but for parameters on different meshes too: under tensor parallelism some are
    split over the ranks of a tensor group and others are whole on each of them, to be counted once.

    Args:
        parameters: of all of the model, DTensors or plain.
        limit: None only computes the norm.

    Returns:
        The 2-norm of all gradients before clipping, a scalar, the same on every rank.
    """
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    norms = []
    for group in by_mesh.values():
        norm = nn.utils.get_total_norm([parameter.grad for parameter in group if parameter.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if limit is not None:
        for group in by_mesh.values():
            nn.utils.clip_grads_with_norm_(group, limit, total)
    return total


class LrSchedule:
    """Linear warm-up, then constant or cosine down to `min_lr_ratio`; a pure function of the optimizer step.

    Args:
        config: rates and shape.
        steps: where the cosine ends; a run that stops earlier (train.stop_at) does not change it.
    """

    def __init__(self, config: OptimConfig, steps: int) -> None:
        self._config, self._steps = config, steps
        self.step = 0  # optimizer steps taken

    def lr(self) -> float:
        """The rate of the next optimizer step."""
        c = self._config
        if self.step < c.warmup_steps:
            return c.lr * (self.step + 1) / c.warmup_steps
        if c.schedule == "constant":
            return c.lr
        share = min(1.0, (self.step - c.warmup_steps) / max(1, self._steps - c.warmup_steps))
        return c.lr * (c.min_lr_ratio + (1 - c.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * share)))

    def state_dict(self) -> dict[str, Any]:
        # The rate is for the receipt of a restore; it follows from the step.
        return {"step": self.step, "lr": self.lr()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
