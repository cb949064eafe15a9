"""Memory and first values for a sharded model that was built on the meta device.

Every module is initialised by its own rules, seeded by (seed, name of the module), and the first weights are the same
for any world size, mesh and device. Small parameters are made in full on every rank, which keeps its part. Of the large
ones a rank draws its part only: what the rule does is recorded, and done to it block by block. A rule that does more
than to fill a tensor or to draw it element by element (see `recorded_rule.StandIn`) is given full-sized tensors for
these, too; that takes 10 ns and 4 bytes for each element of the module, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from areal_ray.models.adapters.adapter import Adapted
from areal_ray.models.initial_parts import draw_part, keep_part, seed_of
from areal_ray.models.recorded_rule import NeedsWholeTensor, StandIn, recording

LARGE = 2**22  # elements of a parameter, from which on it is drawn in parts; smaller ones take 40 ms at most


def materialise(model: nn.Module, device: torch.device, offloaded: bool = False) -> None:
    """Give parameters and buffers memory, with undefined values; tied parameters stay tied.

    Args:
        model: on the meta device, sharded or not.
        device: of the buffers, and of the parameters.
        offloaded: whether the parameters lie in the host's memory instead.
    """
    ties: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                ties.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device="cpu" if offloaded else device)
    if offloaded:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
    for (first, first_name), *others in ties.values():
        for module, name in others:
            module._parameters[name] = first._parameters[first_name]


def init_weights(model: nn.Module, seed: int, adapted: Adapted | None = None) -> None:
    """Set all parameters and buffers of a materialised model.

    Args:
        model: sharded or not.
        seed: of all of it.
        adapted: if it has an adapter. What is the base's, or begins with values of the base, then has those that it
            has without the adapter.

    Raises:
        ValueError: if a module has parameters but no rule to initialise them.
    """
    _init(model, seed, adapted, lambda _: True)


def init_buffers(model: nn.Module, adapted: Adapted | None = None) -> None:
    """Set the buffers only (rotary frequencies and the like): for a model whose parameters are loaded next."""
    _init(model, 0, adapted, lambda _: False)


def init_adapter(model: nn.Module, seed: int, adapted: Adapted) -> None:
    """Set the buffers, and of the parameters those that do not begin with values of the base."""
    _init(model, seed, adapted, lambda name: name not in adapted.base and name not in adapted.copies)


def _init(model: nn.Module, seed: int, adapted: Adapted | None, wanted: Callable[[str], bool]) -> None:
    done: set[int] = set()
    # The first owner of a shared parameter, in the order of the model's modules, decides how it is initialised.
    for name, module in model.named_modules():
        own = {
            key: parameter
            for key, parameter in module._parameters.items()
            if parameter is not None and id(parameter) not in done and wanted(f"{name}.{key}".lstrip("."))
        }
        if not (own or module._buffers):
            continue
        origin = name if adapted is None else adapted.origins.get(name, name)
        full = _values(_Rules(model, adapted), module, name, f"{seed}/{origin}")
        with torch.no_grad():
            for key, parameter in own.items():
                value = full[key]
                if isinstance(value, StandIn):
                    draw_part(parameter, value, f"{seed}/{origin}.{key}")
                else:
                    keep_part(parameter, value)
                done.add(id(parameter))
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    buffer.copy_(full[key])


def _values(rules: _Rules, module: nn.Module, name: str, seed: str) -> dict[str, torch.Tensor]:
    """First values of a module's own parameters and buffers, by name: full-sized, or how they are drawn."""
    large = {
        key
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.numel() >= LARGE and parameter.dtype.is_floating_point
    }
    if large:
        # What a tensor without values does not allow is done again with values; a mistake in the rule shows there, too.
        with suppress(NeedsWholeTensor, RuntimeError, TypeError), recording():
            return _run_rule(rules, module, name, seed, large)
    return _run_rule(rules, module, name, seed)


def _run_rule(
    rules: _Rules, module: nn.Module, name: str, seed: str, without_memory: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]), _full_sized(module, without_memory) as full:
        torch.manual_seed(seed_of(seed))
        _apply_rules(rules, name)
    return full


@contextmanager
def _full_sized(module: nn.Module, without_memory: Collection[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Let a module own, for a moment, full-sized CPU tensors filled with NaN, or stand-ins, for its (sharded) ones."""
    parameters, buffers = module._parameters, module._buffers
    full: dict[str, torch.Tensor] = {}
    for key, tensor in [*parameters.items(), *buffers.items()]:
        if key in without_memory and tensor is not None:
            full[key] = StandIn.of(tensor)
        elif tensor is not None:
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


def _apply_rules(rules: _Rules, name: str) -> None:
    """Set a module's tensors by its rule; what that leaves, by those of the modules that it lies in.

    A router may be set by the rule of its block, and a buffer of a layer by that of the whole model.
    """
    lineage = rules.lineage(name)
    module = lineage[-1]
    rule = rules.of(name)
    if rule is None and rules.are_the_models(name):
        raise ValueError(
            f"module {name!r} ({type(module).__name__}) has parameters or buffers but neither reset_parameters() nor a "
            "model with _init_weights(module): give it a reset_parameters() that sets them"
        )
    # What it does to modules within it is done by their own rules, which come later.
    if rule is not None:
        with _without_values(module, but=module) if next(module.children(), None) is not None else nullcontext():
            rule()
    for depth in range(len(lineage) - 1, 0, -1):
        if not _unset(module):
            return
        if (rule := rules.of(".".join(name.split(".")[: depth - 1]))) is not None:
            with _without_values(lineage[depth - 1], but=module):
                rule()
    if unset := _unset(module):
        if isinstance(module._parameters.get(unset[0]), StandIn):
            raise NeedsWholeTensor(f"{name}.{unset[0]}")
        raise ValueError(f"{name}.{unset[0]}: the initialisation of {type(module).__name__} does not set it")


class _Rules:
    """What sets the tensors of a module, by its name.

    Args:
        model: all of it.
        adapted: if it has an adapter, which has the rules for its own modules.
    """

    def __init__(self, model: nn.Module, adapted: Adapted | None) -> None:
        self._model, self._adapted = model, adapted

    def lineage(self, name: str) -> list[nn.Module]:
        """The model, what lies in it on the way to a module, and the module itself."""
        lineage = [self._model]
        for part in name.split(".") if name else ():
            lineage.append(lineage[-1].get_submodule(part))
        return lineage

    def are_the_models(self, name: str) -> bool:
        """Whether a module is set as it is without an adapter; else it may be by those that it lies in."""
        return self._adapted is None or name in self._adapted.origins

    def of(self, name: str) -> Callable[[], None] | None:
        """The rule of a module; None if it has none."""
        lineage = self.lineage(name)
        module = lineage[-1]
        if self._adapted is not None and not self.are_the_models(name):
            return self._adapted.adapter.rule(module)
        if hasattr(self._model, "_init_weights"):  # transformers: one call per module, to the innermost model around it
            owner: Any = next(each for each in reversed(lineage) if hasattr(each, "_init_weights"))
            return lambda: owner._init_weights(module)
        rule = getattr(type(module), "reset_parameters", None)
        return None if rule is None else lambda: rule(module)


def _unset(module: nn.Module) -> list[str]:
    """Names of the module's own tensors of which some values are not set."""
    return [
        key
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if (isinstance(tensor, StandIn) and not tensor.is_set)
        or (
            tensor is not None
            and not isinstance(tensor, StandIn)
            and tensor.dtype.is_floating_point
            and bool(tensor.isnan().any())
        )
    ]


@contextmanager
def _without_values(above: nn.Module, but: nn.Module) -> Iterator[None]:
    """Let all modules in one have tensors on the meta device, for a moment, where a rule changes nothing."""
    kept = [(each, each._parameters, each._buffers) for each in above.modules() if each is not but]
    for module, parameters, buffers in kept:
        module._parameters = {
            k: None
            if p is None
            else nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)
            for k, p in parameters.items()
        }
        module._buffers = {
            k: None if b is None else torch.empty(b.shape, dtype=b.dtype, device="meta") for k, b in buffers.items()
        }
    try:
        yield
    finally:
        for module, parameters, buffers in kept:
            module._parameters, module._buffers = parameters, buffers
