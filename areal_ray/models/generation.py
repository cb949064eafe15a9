"""The way in which a pretrained model is meant to generate: its generation_config.json."""

from __future__ import annotations

import json
from typing import Any

from areal_ray.config import ConfigError, ModelConfig


def source_generation(config: ModelConfig) -> dict[str, Any] | None:
    """The content of the generation_config.json beside the weights of model.path; None if there is none.

    Reads one small file, or asks the hub for it.

    Raises:
        ConfigError: if there is one that cannot be read.
    """
    if config.path is None:
        return None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            config.path, "generation_config.json", _raise_exceptions_for_missing_entries=False, local_files_only=False
        )
        if found is None:
            return None
        with open(found, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        text = f"{config.path}: generation_config.json cannot be read: {' '.join(str(error).split())[:200]}"
        raise ConfigError("model.path", text) from None
    if not isinstance(content, dict):
        raise ConfigError("model.path", f"{config.path}: generation_config.json holds no object")
    return content
