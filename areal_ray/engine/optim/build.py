"""From optim in the configuration to a torch optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from areal_ray.config import ConfigError, OptimConfig, plugin
from areal_ray.engine.optim.adafactor import ShardedAdafactor
from areal_ray.engine.optim.grid import RankGrid
from areal_ray.engine.optim.groups import parameter_groups
from areal_ray.engine.optim.muon import MuonWithAdamW, allocate_adamw, split_groups

_NO_CLOSURE = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    restored: bool = False,
    mesh: DeviceMesh | None = None,
    precision: str = "float32",
) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, over the parameters that are trained.

    The state of those that this package has is allocated at once: a run that does not fit into memory says so at its
    start, and a save before the first step has the same keys as any other. An optimizer of one's own makes its state
    with its first step, as it would alone; one that is about to be restored gets memory for all of it.

    Args:
        model: sharded or not, or on the meta device.
        config: optim.
        restored: whether a checkpoint is loaded next.
        mesh: of all ranks; None: there is one, or the model is not sharded.
        precision: of the model's computation, in which Muon orthogonalises unless it is told another one.

    Raises:
        ConfigError: if it does not take optim.args; if one's own factory fails, or returns no torch optimizer, or one
            that takes a closure.
    """
    groups, name = parameter_groups(model, config), config.name
    own = plugin.is_plugin(name)
    if own:
        make = plugin.factory(name, "optim.name", {})
        made: Any = plugin.call(make, name, "optim.args", groups, **config.args)
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError("optim.name", f"{name} returned {type(made).__name__}, no torch.optim.Optimizer")
        if inspect.signature(made.step).parameters.get("closure", _NO_CLOSURE).default is inspect.Parameter.empty:
            raise ConfigError("optim.name", f"{name}: {type(made).__name__} takes a closure, which there is not")
    else:
        builder = _Builder(model, config, groups, RankGrid(mesh), precision)
        make = getattr(builder, name)
        plugin.check_args(make, name, "optim.args", **config.args)
        made = plugin.call(make, name, "optim.args", **config.args)
    for group in made.param_groups:
        group["initial_lr"] = group["lr"]
    if own and restored:
        _make_state(made)
    return made


class _Builder:
    """The optimizers of this package, by the names that `optim.name` has for them; their arguments are `optim.args`."""

    def __init__(
        self, model: nn.Module, config: OptimConfig, groups: list[dict[str, Any]], grid: RankGrid, precision: str
    ) -> None:
        self._model, self._config, self._groups, self._grid = model, config, groups, grid
        self._precision = precision

    def adamw(self) -> torch.optim.Optimizer:
        """AdamW, Loshchilov & Hutter, 2019."""
        c = self._config
        made = torch.optim.AdamW(self._groups, lr=c.lr, betas=c.betas, eps=c.eps, fused=True)
        allocate_adamw(made)
        return made

    def sgd(self, momentum: float = 0.9, nesterov: bool = False) -> torch.optim.Optimizer:
        """SGD; its momentum begins with zeros, which is the same as to begin with the first gradient."""
        made = torch.optim.SGD(self._groups, lr=self._config.lr, momentum=momentum, nesterov=nesterov, foreach=True)
        for p in (p for group in made.param_groups if momentum for p in group["params"]):
            made.state[p] = {"momentum_buffer": torch.zeros_like(p, memory_format=torch.preserve_format)}
        return made

    def adafactor(
        self, beta2_decay: float = -0.8, eps: tuple[float | None, float] = (None, 1e-3), d: float = 1.0
    ) -> torch.optim.Optimizer:
        first, second = eps
        allowed: Any = {"beta2_decay": beta2_decay, "eps": (first, second), "d": d}
        torch.optim.Adafactor([torch.empty(0)], **allowed)  # raises what it has to say of them
        made = ShardedAdafactor(self._groups, self._grid, beta2_decay, (first, second), d)
        made.allocate()
        return made

    def muon(
        self,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_steps: int = 5,
        eps: float = 1e-7,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        precision: Literal["bfloat16", "float32"] | None = None,
        adamw: tuple[str, ...] = (),
    ) -> torch.optim.Optimizer:
        settings: Any = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "ns_steps": ns_steps,
            "eps": eps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        torch.optim.Muon([torch.empty(0, 0)], **settings)  # raises what it has to say of them
        precision = precision or self._precision  # type: ignore[assignment]
        if precision not in ("bfloat16", "float32"):
            raise ConfigError("optim.args.precision", f"must be bfloat16 or float32, not {precision!r}")
        hidden, others = split_groups(self._model, self._groups, adamw)
        of_adamw = self._config.betas, self._config.eps
        made = MuonWithAdamW(hidden, others, self._grid, *of_adamw, **settings, precision=precision)
        made.allocate()
        return made


def same_state(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an optimizer of this package has state of the same names with other `optim.args`."""
    if name == "muon":
        return list(before.get("adamw", ())) == list(now.get("adamw", ()))
    return name != "sgd" or bool(before.get("momentum", 0.9)) == bool(now.get("momentum", 0.9))


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step reads `optimizer.found_inf`, a scalar on the device, and changes nothing where that is 1.

    That is torch's convention between GradScaler and its fused optimizers; their step counters stay, too.
    """
    supports = getattr(optimizer, "_step_supports_amp_scaling", False)
    return supports and "grad_scaler" not in inspect.signature(optimizer.step).parameters  # the older convention


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
