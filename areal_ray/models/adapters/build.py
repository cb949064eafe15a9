"""Adapters by the names of the configuration."""

from __future__ import annotations

import torch
from torch import nn

from areal_ray.config import AdapterConfig, ConfigError, ModelConfig, plugin
from areal_ray.models.adapters.adapter import Adapted, Adapter, attach
from areal_ray.models.build import build_model


def build_adapter(config: AdapterConfig) -> Adapter:
    """The adapter that the configuration names.

    Raises:
        ConfigError: if it cannot be found or made, or is none, or needs a package that is not installed.
    """
    if config.name == "lora":
        try:
            from areal_ray.models.adapters.lora import Lora
        except ModuleNotFoundError as error:
            text = f"lora needs a package that is not installed ({error.name}): pip install 'areal_ray[lora]'"
            raise ConfigError("adapter.name", text) from None
        return Lora(config.args)
    made = plugin.call(plugin.factory(config.name, "adapter.name", {}), config.name, "adapter.args", **config.args)
    if not isinstance(made, Adapter):
        raise ConfigError(
            "adapter.name", f"{config.name} returned {type(made).__name__}, no Adapter of areal_ray.models"
        )
    return made


def build_adapted(
    model: ModelConfig, adapter: AdapterConfig | None, precision: str = "float32"
) -> tuple[nn.Module, Adapted | None]:
    """The model on the meta device, with its adapter if it has one.

    Args:
        model, adapter: as configured.
        precision: of the computation. In that a base from model.path is held: it is not changed, only computed with.

    Raises:
        ConfigError: if one of them cannot be built, or they do not go together.
    """
    built = build_model(model)
    if adapter is None:
        return built, None
    with torch.device("meta"):
        adapted = attach(build_adapter(adapter), built)
    if model.path and precision == "bfloat16":
        for name in adapted.frozen:
            parameter = built.get_parameter(name)
            parameter.data = parameter.data.to(torch.bfloat16)
    return built, adapted
