"""Models built from the configuration, on the meta device."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from areal_ray.config import ConfigError, ModelConfig, plugin


def build_model(config: ModelConfig) -> nn.Module:
    """The model on the meta device: shapes and names, no memory.

    Raises:
        ConfigError: if transformers knows no such architecture, or the factory cannot be found or fails.
    """
    # Found before: a user's module that is imported now is no part of the model.
    factory = plugin.factory(config.factory, "model.factory", {}) if config.factory else None
    with torch.device("meta"):
        model = _from_factory(config, factory) if factory else _from_transformers(config)
    return model.train()


def check_model(config: ModelConfig, vocab_size: int) -> None:
    """Find out before anything is started whether the model can be built and has a row for every token.

    Raises:
        ConfigError: if not.
    """
    if config.factory:
        build_model(config)
        return
    rows = getattr(_transformers_config(config), "vocab_size", vocab_size)
    if rows < vocab_size:
        key = "model.path" if config.path else "model.config.vocab_size"
        raise ConfigError(
            key, f"the model has {rows} rows of embeddings, but the tokenizer has ids up to {vocab_size - 1}"
        )


def architecture(config: ModelConfig) -> dict[str, Any] | None:
    """The content of config.json in a Hugging Face directory of the model; None for a factory's."""
    if config.factory:
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    transformers_config = _transformers_config(config)
    transformers_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[transformers_config.model_type]]
    transformers_config.dtype = "float32"
    return dict(json.loads(transformers_config.to_json_string()))


def same_architecture(saved: dict[str, Any], config: ModelConfig) -> bool:
    """Whether the config of a directory, as `architecture` gives it, is that of this model."""
    from transformers import AutoConfig

    # Both through the same library: what a config leaves out is a default, and defaults change with versions.
    both = [AutoConfig.for_model(**values).to_dict() for values in (saved, architecture(config) or {})]
    return both[0] == both[1]


def _transformers_config(config: ModelConfig) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.path:
        try:
            found = AutoConfig.from_pretrained(config.path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise ConfigError("model.path", f"no Hugging Face model in {config.path!r}: {text}") from None
        if found.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ConfigError("model.path", f"{config.path!r} is no causal language model but {found.model_type!r}")
        return found
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


def _from_transformers(config: ModelConfig) -> nn.Module:
    from transformers import AutoModelForCausalLM

    transformers_config = _transformers_config(config)
    try:
        # float32 whatever the files are in: these are the weights that the optimizer changes.
        model = AutoModelForCausalLM.from_config(
            transformers_config, attn_implementation="sdpa", dtype=torch.float32, trust_remote_code=False
        )
    except ValueError as error:
        key = "model.path" if config.path else "model.config.model_type"
        raise ConfigError(key, " ".join(str(error).split())[:300]) from None
    model.config.use_cache = False
    return model


def _from_factory(config: ModelConfig, factory: Callable[..., Any]) -> nn.Module:
    assert config.factory
    model = plugin.call(factory, config.factory, "model.factory", **config.args)
    if not isinstance(model, nn.Module):
        raise ConfigError("model.factory", f"{config.factory} returned {type(model).__name__}, not a torch.nn.Module")
    return model
