"""Optimizer, parameter groups, gradient norm and learning-rate schedule."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from areal_ray.config import ConfigError, OptimConfig, ParameterGroupConfig, plugin

_NO_CLOSURE = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def build_optimizer(model: nn.Module, config: OptimConfig, restored: bool = False) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, over the parameters that are trained.

    AdamW's state (step, exp_avg, exp_avg_sq) is allocated at once: a run that does not fit into memory says so at its
    start, and a save before the first step has the same keys as any other. Another optimizer makes its state with its
    first step, as it would alone; one that is about to be restored gets memory for all of it.

    Args:
        model: sharded or not.
        config: optim.
        restored: whether a checkpoint is loaded next.

    Raises:
        ConfigError: if one's own factory fails, or returns no torch optimizer, or one that takes a closure.
    """
    groups = parameter_groups(model, config)
    if not plugin.is_plugin(config.name):  # AdamW, Loshchilov & Hutter, 2019
        made: Any = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    else:
        make = plugin.factory(config.name, "optim.name", {})
        made = plugin.call(make, config.name, "optim.args", groups, **config.args)
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError("optim.name", f"{config.name} returned {type(made).__name__}, no torch.optim.Optimizer")
        if inspect.signature(made.step).parameters.get("closure", _NO_CLOSURE).default is inspect.Parameter.empty:
            raise ConfigError("optim.name", f"{config.name}: {type(made).__name__} takes a closure, which there is not")
    for group in made.param_groups:
        group["initial_lr"] = group["lr"]
    if not plugin.is_plugin(config.name):
        _allocate_adamw(made)
    elif restored:
        _make_state(made)
    return made


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step reads `optimizer.found_inf`, a scalar on the device, and changes nothing where that is 1.

    That is torch's convention between GradScaler and its fused optimizers; their step counters stay, too.
    """
    supports = getattr(optimizer, "_step_supports_amp_scaling", False)
    return supports and "grad_scaler" not in inspect.signature(optimizer.step).parameters  # the older convention


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


def _allocate_adamw(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the state that it would make in its first step (torch/optim/adam.py, `_init_group`), without one."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Run one step that changes nothing, then take it off the step counters again.

    Gradients, rates and decay are zero meanwhile. What an optimizer begins with may be something else: the state is
    only made to be overwritten.
    """
    before = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group |= {name: 0.0 for name in ("lr", "weight_decay") if name in group}
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, settings in zip(optimizer.param_groups, before, strict=True):
        group |= settings
    for state in optimizer.state.values():
        if isinstance(step := state.get("step"), torch.Tensor):
            step.zero_()
        elif step is not None:
            state["step"] = 0


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


class LrSchedule:
    """Linear warm-up, then constant or cosine down to `min_lr_ratio`; a pure function of the optimizer step.

    It multiplies each parameter group's own rate.

    Args:
        config: rates and shape.
        steps: where the cosine ends; a run that stops earlier (train.stop_at) does not change it.
    """

    def __init__(self, config: OptimConfig, steps: int) -> None:
        self._config, self._steps = config, steps
        self.step = 0  # optimizer steps taken

    def lr(self, base: float) -> float:
        """The rate of the next optimizer step for a group whose own rate is `base`."""
        c = self._config
        if self.step < c.warmup_steps:
            return base * (self.step + 1) / c.warmup_steps
        if c.schedule == "constant":
            return base
        share = min(1.0, (self.step - c.warmup_steps) / max(1, self._steps - c.warmup_steps))
        return base * (c.min_lr_ratio + (1 - c.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * share)))

    def state_dict(self) -> dict[str, Any]:
        # The rate is for the receipt of a restore; it follows from the step.
        return {"step": self.step, "lr": self.lr(self._config.lr)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
