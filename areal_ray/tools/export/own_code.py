"""Code of a model's own class, put beside its weights so that transformers finds it (trust_remote_code)."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from areal_ray.storage import Storage


def write_code(out: Storage, kind: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the modules of a class and of its config class, and of what they import relatively.

    Returns:
        config.json with the `auto_map` that leads to them.

    Raises:
        ValueError: if they lie in no file, or two of them have the same name.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    auto_map, files = dict[str, str](), dict[str, str]()
    for role, each in (("AutoConfig", kind.config_class), ("AutoModelForCausalLM", kind)):
        if each.__module__.startswith("transformers."):
            continue
        path = getattr(sys.modules[each.__module__], "__file__", None)
        if path is None:
            raise ValueError(f"{each.__module__} lies in no file, which could be put beside the weights")
        for needed in (path, *get_relative_import_files(path)):
            name = os.path.basename(needed)
            if files.setdefault(name, needed) != needed:
                raise ValueError(f"{files[name]} and {needed} cannot both be put beside the weights")
        auto_map[role] = f"{each.__module__.rpartition('.')[2]}.{each.__qualname__}"
    for name, path in files.items():
        with open(path, "rb") as file:
            out.replace(name, file.read())
    return {**config, "auto_map": auto_map} if auto_map else dict(config)
