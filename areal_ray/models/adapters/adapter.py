"""The interface of adapters, and what a model with one consists of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from areal_ray.config import ConfigError
from areal_ray.models.hf_weights import weights_of


class Adapter(ABC):
    """Trained parameters that are put into a model; one's own is named by `adapter: {name: package.module:Class}`.

    It is called with adapter.args. What it is trained from, the parameters that the model has without it (the base),
    is frozen and in no checkpoint.
    """

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Put it into a model on the meta device, in place.

        The base's parameters must stay the same objects, wherever they lie afterwards, and new ones lie in modules of
        their own.

        Raises:
            ConfigError: if it is not for this model.
        """

    @abstractmethod
    def disabled(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which the model with the adapter computes what the base does. It must not touch parameters."""

    def rule(self, module: nn.Module) -> Callable[[], None] | None:
        """How first values are given to a module of the adapter and those in it; None: by those that it lies in."""
        own = getattr(type(module), "reset_parameters", None)
        return None if own is None else lambda: own(module)

    def copies(self, model: nn.Module) -> Mapping[str, str]:
        """Names of the modules of the adapter that begin with the values of one of the base, with the name of that."""
        return {}

    def merged(
        self, model: nn.Module, name: str, weight: torch.Tensor, trained: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """A weight of the base with what the adapter adds to it, for an export without the adapter.

        Args:
            model: with the adapter, on the meta device.
            name: of the weight there.
            weight: perhaps a lazy tensor, see `lazy_tensor`; it is returned as it is where nothing is added.
            trained: the parameters of the adapter, by name.

        Raises:
            ValueError: if it cannot be merged.
        """
        raise ValueError(f"{type(self).__name__} has no merged(): it is exported as it is only")

    def directory(
        self, model: nn.Module, trained: Mapping[str, torch.Tensor], base: str | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors of adapter_model.safetensors and content of adapter_config.json, for an export.

        Args:
            model, trained: as for `merged`.
            base: directory or hub name of the base; None if it has none.
        """
        return dict(trained), {"base_model_name_or_path": base}


@dataclass(frozen=True)
class Adapted:
    """A model with an adapter: which of its weights are whose. Names stay what they are when the model is sharded.

    Args:
        adapter: that was attached.
        base: weights of the base (parameters, persistent buffers), each once: name here to name without the adapter.
        frozen: names here of those that are parameters.
        copies: parameters of the adapter that begin with values of the base: name here to name of those.
        origins: modules that are the base's, or copies of such: name here to name without the adapter.
    """

    adapter: Adapter
    base: Mapping[str, str]
    frozen: frozenset[str]
    copies: Mapping[str, str]
    origins: Mapping[str, str]

    def trained(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of the weights by their names here all but what is frozen: a checkpoint has these only."""
        return {name: tensor for name, tensor in weights.items() if name not in self.frozen}


def attach(adapter: Adapter, model: nn.Module) -> Adapted:
    """Put an adapter into a model and freeze all that is not the adapter's.

    Args:
        adapter: of the run.
        model: as built, on the meta device.

    Raises:
        ConfigError: if the adapter is not for this model, or does something to it that `Adapter.attach` must not.
    """
    persistent = weights_of(model).keys()
    modules_before = {id(module): name for name, module in model.named_modules()}
    before = _places(model)
    adapter.attach(model)
    after = _places(model)
    origins = {name: modules_before[id(m)] for name, m in model.named_modules() if id(m) in modules_before}
    what = type(adapter).__name__
    if lost := [names[0] for key, names in before.items() if key not in after and names[0] in persistent]:
        raise ConfigError("adapter.name", f"{what} takes {lost[0]} of the base away, which it must leave where it is")
    base = {after[key][0]: names[0] for key, names in before.items() if names[0] in persistent}
    _check_tied(what, before, after)
    frozen = set()
    for name, parameter in model.named_parameters():
        if name in base:
            parameter.requires_grad_(False)
            frozen.add(name)
        elif name.rpartition(".")[0] in origins:
            raise ConfigError("adapter.name", f"{what} puts {name} into a module of the base; give it one of its own")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("adapter.args", f"{what} puts no parameter that is trained into {type(model).__name__}")
    copies: dict[str, str] = {}
    for name, original in adapter.copies(model).items():
        copy = model.get_submodule(name)
        inner = {here: f"{original}.{here}".rstrip(".") for here, _ in copy.named_modules()}
        origins |= {f"{name}.{here}".rstrip("."): origins[there] for here, there in inner.items()}
        copies |= {f"{name}.{key}": base[f"{original}.{key}"] for key, _ in copy.named_parameters()}
    return Adapted(adapter, base, frozenset(frozen), copies, origins)


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Names of each parameter and buffer, by its id."""
    places: dict[int, list[str]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        places.setdefault(id(tensor), []).append(name)
    return places


def _check_tied(what: str, before: Mapping[int, list[str]], after: Mapping[int, list[str]]) -> None:
    for key, names in before.items():
        if len(names) > 1 and names != after.get(key):
            shared = " and ".join(names)
            text = f"{what} is for {shared}, which are one weight (tied): with it they could not be one; leave them out"
            raise ConfigError("adapter.args", text)
