"""Rules of the model's part of a configuration."""

from __future__ import annotations

import os
import re

from areal_ray.config.errors import ConfigError
from areal_ray.config.model_schema import ModelConfig


def check_model(model: ModelConfig) -> None:
    """Raise ConfigError for the first rule that the model's part breaks."""
    ways = [bool(model.config), bool(model.factory)]
    if sum(ways) > 1 or not (any(ways) or model.path) or (any(ways) and _says_what_it_is(model.path)):
        text = "give either model.config (a transformers config), model.path (Hugging Face weights) or model.factory"
        hint = "; model=pretrained picks a group without config" if model.path else ""
        raise ConfigError("model.config", text + hint)
    if model.config and "model_type" not in model.config:
        raise ConfigError("model.config", "model_type is missing, for example model_type: qwen3")
    if model.path is None:
        for key in ("merge_adapter", "names", "allow_missing", "allow_unused"):
            if getattr(model, key):
                raise ConfigError(f"model.{key}", "is for the weights of model.path, which is not set")
    if model.factory and (model.merge_adapter or model.tie is not None):
        key = "merge_adapter" if model.merge_adapter else "tie"
        raise ConfigError(f"model.{key}", "is for models of transformers, not for a model.factory")
    patterns = [(f"names[{i}].pattern", each.pattern) for i, each in enumerate(model.names)]
    for key in ("allow_missing", "allow_unused"):
        patterns += [(f"{key}[{i}]", pattern) for i, pattern in enumerate(getattr(model, key))]
    for key, pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"model.{key}", f"{pattern!r} is no pattern: {error}") from None
    for i, each in enumerate(model.names):
        try:
            re.compile(each.pattern).sub(each.replace, "")
        except (re.error, IndexError) as error:
            raise ConfigError(f"model.names[{i}].replace", f"{each.replace!r} is none: {error}") from None


def _says_what_it_is(path: str | None) -> bool:
    """Whether a path is of something that has a config.json: a name on the hub, or a directory that is one.

    Of what is no directory of weights of another kind, a config beside it would be one too many. A directory that is
    gone had none: a run that goes on does not need it any more, and a new one is told that there is nothing.
    """
    if path is None or "://" in path:
        return False
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        return not os.path.isabs(path)
    return os.path.isfile(os.path.join(path, "config.json"))
