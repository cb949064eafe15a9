"""Secrets blanked out of whatever is shown or written down."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

_SECRET = re.compile(r"(^|_)(secret|password|passwd|token|credential|api_key|access_key|secret_key)s?$", re.I)


_NO_SECRET = re.compile(r"(bos|eos|pad|unk|sep|cls|mask)_token$", re.I)


def redact(value: Any, key: str = "") -> Any:
    """A tree of plain values with `***` for whatever stands under a key that names a secret."""
    counted = isinstance(value, int | float) and key.lower().endswith(("token", "tokens"))  # a number of tokens
    if value not in (None, "", {}, []) and _SECRET.search(key) and not _NO_SECRET.search(key) and not counted:
        return "***"
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v) for v in value]
    return value


def redact_override(override: str) -> str:
    """A key=value string, with `***` for what names a secret."""
    key, _, text = override.partition("=")
    tree = yaml.safe_load(text)
    for part in reversed(key.split(".")):
        tree = {part: tree}
    safe = redact(tree)
    if safe == tree:
        return override
    for part in key.split("."):
        safe = safe[part] if isinstance(safe, dict) else safe
    return f"{key}={json.dumps(safe)}"
