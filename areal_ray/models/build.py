"""From the config to a model without weights."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from areal_ray.config import ConfigError, Model


def build_model(config: Model) -> nn.Module:
    """The model on the meta device: shapes and names, no memory.

    Raises:
        ConfigError: if transformers knows no such architecture, or the factory cannot be found or fails.
    """
    with torch.device("meta"):
        model = _from_factory(config) if config.factory else _from_transformers(config)
    return model.train()


def check_model(config: Model, vocab_size: int) -> None:
    """Find out before anything is started whether the model can be built and has a row for every token.

    Raises:
        ConfigError: if not.
    """
    if config.factory:
        build_model(config)
        return
    rows = getattr(_transformers_config(config), "vocab_size", vocab_size)
    if rows < vocab_size:
        raise ConfigError("model.config.vocab_size", f"is {rows}, but the tokenizer has {vocab_size} tokens")


def _transformers_config(config: Model) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values = dict(config.config)
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ConfigError("model.config.model_type", f"transformers has no {model_type!r}")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError("model.config.model_type", f"transformers has no causal language model {model_type!r}")
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # noqa: BLE001  (each architecture refuses values in its own way)
        raise ConfigError("model.config", " ".join(str(error).split())) from None


def _from_transformers(config: Model) -> nn.Module:
    from transformers import AutoModelForCausalLM

    transformers_config = _transformers_config(config)
    try:
        model = AutoModelForCausalLM.from_config(transformers_config, attn_implementation="sdpa")
    except ValueError as error:
        raise ConfigError("model.config.model_type", " ".join(str(error).split())[:300]) from None
    model.config.use_cache = False
    return model


def _find_factory(name: str) -> Any:
    module_name, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function)
    except ModuleNotFoundError as error:
        raise ConfigError("model.factory", f"{error} (looked for {name})") from None
    except AttributeError:
        raise ConfigError("model.factory", f"{module_name} has no {function}") from None


def _from_factory(config: Model) -> nn.Module:
    assert config.factory
    factory = _find_factory(config.factory)
    try:
        model = factory(**config.args)
    except Exception as error:
        raise ConfigError("model.factory", f"{config.factory} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError("model.factory", f"{config.factory} returned {type(model).__name__}, not a torch.nn.Module")
    return model
