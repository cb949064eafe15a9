"""Models built from the configuration, on the meta device."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
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


def build_saved(values: Mapping[str, Any]) -> nn.Module:
    """The model of a config.json, as `architecture` gives it, on the meta device.

    Raises:
        ValueError: if it is of no model that transformers builds.
    """
    from transformers import AutoConfig

    try:
        with torch.device("meta"):
            return _of_config(AutoConfig.for_model(**values), ModelConfig())
    except Exception as error:  # noqa: BLE001  (each architecture refuses values in its own way)
        raise ValueError(f"no model can be built of its config: {' '.join(str(error).split())[:200]}") from None


def check_model(config: ModelConfig, model: nn.Module, vocab_size: int, seq_len: int) -> None:
    """Find out before anything is started whether the model has a row for every token and every position.

    Args:
        config: of the model, for messages.
        model: built from it, see `build_model`.
        vocab_size: ids of the tokenizer.
        seq_len: tokens of a row.

    Raises:
        ConfigError: if not.
    """
    rows = _rows(model)
    if rows is not None and rows < vocab_size:
        key = "model.config.vocab_size" if config.config else "model.path" if config.path else "model.factory"
        raise ConfigError(
            key, f"the model has {rows} rows of embeddings, but the tokenizer has ids up to {vocab_size - 1}"
        )
    positions = _positions(model)
    if positions is not None and positions < seq_len:
        text = f"the model has {positions} positions, and rows of {seq_len} tokens do not fit: at most {positions}"
        raise ConfigError("train.seq_len", text)


def table_sizes(model: nn.Module) -> tuple[int | None, int | None]:
    """Rows of a model's embedding of tokens and of its table of positions; None where it has none, or does not say."""
    return _rows(model), _positions(model)


def attention_of(model: nn.Module) -> str | None:
    """How a model computes attention: sdpa, eager, ...; None if it does not say."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def is_tied(model: nn.Module) -> bool | None:
    """Whether a model of transformers has one matrix for embedding and head; None if its config does not say."""
    return getattr(getattr(model, "config", None), "tie_word_embeddings", None)


def architecture(config: ModelConfig) -> dict[str, Any] | None:
    """The content of config.json in a Hugging Face directory of the model; None for a factory's."""
    if config.factory:
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    transformers_config = _transformers_config(config)
    transformers_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[transformers_config.model_type]]
    transformers_config.dtype = "float32"
    return dict(json.loads(transformers_config.to_json_string()))


def factory_architecture(config: ModelConfig) -> dict[str, Any] | None:
    """Class and config of a factory's model that is a PreTrainedModel, for an export; None for any other.

    Returns:
        class: "package.module:Class". config: the content of its config.json.
    """
    if not config.factory:
        return None
    model = build_model(config)
    kind = type(model)
    own: Any = getattr(model, "config", None)
    if not hasattr(own, "to_json_string") or "<locals>" in kind.__qualname__:
        return None
    values = dict(json.loads(own.to_json_string()))
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "config": {**values, "architectures": [kind.__name__]}}


def build_of_class(named: str, values: Mapping[str, Any], key: str) -> nn.Module:
    """The model of a class of one's own, on the meta device; imports and runs its code.

    Args:
        named: "package.module:Class", a PreTrainedModel whose `config_class` takes the values.
        values: of its config.json.
        key: where it was named, for errors.

    Raises:
        ConfigError: if there is no such class, or it refuses them.
    """
    kind = plugin.resolve(named, key)
    config_class = getattr(kind, "config_class", None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and config_class is not None):
        raise ConfigError(key, f"{named} is no transformers PreTrainedModel with a config_class")
    with torch.device("meta"):
        model = plugin.call(lambda: kind(config_class.from_dict(dict(values))), named, key)
    assert isinstance(model, nn.Module)
    return model.train()


def same_architecture(saved: dict[str, Any], config: ModelConfig) -> bool:
    """Whether the config of a directory, as `architecture` gives it, is that of this model."""
    from transformers import AutoConfig

    # Both through the same library: what a config leaves out is a default, and defaults change with versions.
    both = [AutoConfig.for_model(**values).to_dict() for values in (saved, architecture(config) or {})]
    return both[0] == both[1]


def _transformers_config(config: ModelConfig) -> Any:
    found = _config_of(config)
    if config.tie is not None:
        found.tie_word_embeddings = config.tie
    return found


def _config_of(config: ModelConfig) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.path and not config.config:
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
    transformers_config = _transformers_config(config)
    if getattr(transformers_config, "quantization_config", None):
        raise ConfigError("model.path", "its weights are quantized, and are not trained so; give unquantized ones")
    try:
        return _of_config(transformers_config, config)
    except Exception as error:  # noqa: BLE001  (each architecture refuses values in its own way)
        text = " ".join(str(error).split())[:300]
        if config.attention != "auto" and _builds(transformers_config):
            raise ConfigError(
                "model.attention", f"{config.attention} is not for this model on this machine: {text}"
            ) from None
        key = "model.config" if config.config else "model.path"
        raise ConfigError(key, text or type(error).__name__) from None


def _of_config(transformers_config: Any, config: ModelConfig) -> nn.Module:
    from transformers import AutoModelForCausalLM

    # With None it is scaled_dot_product_attention where the model has it, and else eager.
    attention = None if config.attention == "auto" else config.attention
    # float32 whatever the files are in: these are the weights that the optimizer changes.
    model = AutoModelForCausalLM.from_config(
        transformers_config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
    )
    model.config.use_cache = False
    return model


def _builds(transformers_config: Any) -> bool:
    """Whether the model can be built with its own choice of attention."""
    with torch.device("meta"), suppress(Exception):
        _of_config(transformers_config, ModelConfig())
        return True
    return False


def _rows(model: nn.Module) -> int | None:
    """Ids that a model has a row of embeddings for; None if it does not say."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return int(table.num_embeddings) if isinstance(table, nn.Embedding) else None


def _positions(model: nn.Module) -> int | None:
    """The length of a model's table of positions; None if it computes them (rotary ones, ALiBi) or does not say.

    transformers has no one name for such a table. It is an embedding, or a buffer, that has a dimension of as many rows
    as the config says that there are positions, or a few more (OPT begins with the third).
    """
    said = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(said, int):
        return None
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    tables += [buffer for buffer in model.buffers() if buffer.ndim > 1]
    return said if any(0 <= size - said <= 2 for table in tables for size in table.shape) else None


def _from_factory(config: ModelConfig, factory: Callable[..., Any]) -> nn.Module:
    assert config.factory
    model = plugin.call(factory, config.factory, "model.factory", **config.args)
    if not isinstance(model, nn.Module):
        raise ConfigError("model.factory", f"{config.factory} returned {type(model).__name__}, not a torch.nn.Module")
    return model
