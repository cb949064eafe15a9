"""The way in which a pretrained model is meant to generate: its generation_config.json."""

from __future__ import annotations

import json
import os
from typing import Any

from areal_ray.config import ConfigError, ModelConfig


def source_generation(config: ModelConfig) -> dict[str, Any] | None:
    """The content of the generation_config.json beside the weights of model.path; None if there is none.

    Reads one small file, or asks the hub for it. Beside a checkpoint's weights there is none: what model those are is
    said by model.config or model.factory. Nor is there where a directory is gone, as a run that goes on may find.

    Raises:
        ConfigError: if there is one that cannot be read.
    """
    path = config.path
    if path is None or "://" in path or config.config or config.factory:
        return None
    if os.path.isabs(path) and not os.path.isdir(path):
        return None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            path, "generation_config.json", _raise_exceptions_for_missing_entries=False, local_files_only=False
        )
        if found is None:
            return None
        with open(found, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        text = f"{path}: generation_config.json cannot be read: {' '.join(str(error).split())[:200]}"
        raise ConfigError("model.path", text) from None
    if not isinstance(content, dict):
        raise ConfigError("model.path", f"{path}: generation_config.json holds no object")
    return content
