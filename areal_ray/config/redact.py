"""Secrets blanked out of whatever is shown or written down."""

from __future__ import annotations

import json
import re
from typing import Any

from omegaconf import OmegaConf

# The last words of a name, as in WANDB_API_KEY, secretKey or http-bearer.
_SECRET = re.compile(
    r"(^|_)(secret|password|passwd|pwd|passphrase|token|credential|auth|authorization|bearer|cookie|dsn"
    r"|(api|access|secret|private|signing|encryption)_?key)s?$"
)
_NO_SECRET = re.compile(r"(^|_)(bos|eos|pad|unk|sep|cls|mask)_token$")
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")


def names_a_secret(key: str) -> bool:
    """Whether a key, by its name, has a value that is to be shown nowhere."""
    words = _WORDS.sub("_", key).lower()
    return bool(_SECRET.search(words)) and not _NO_SECRET.search(words)


def redact(value: Any, key: str = "") -> Any:
    """A tree of plain values with `***` for whatever stands under a key that names a secret."""
    counted = isinstance(value, int | float) and key.lower().endswith(("token", "tokens"))  # a number of tokens
    if value not in (None, "", {}, []) and names_a_secret(key) and not counted:
        return "***"
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v) for v in value]
    return value


def redact_override(override: str) -> str:
    """A key=value string, with `***` for what names a secret."""
    key, _, text = override.partition("=")
    # Read as the configuration reads it: PyYAML's own ways know dates, and refuse a text that looks like a wrong one.
    tree = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload, index]
    for part in reversed(key.split(".")):
        tree = {part: tree}
    safe = redact(tree)
    if safe == tree:
        return override
    for part in key.split("."):
        safe = safe[part] if isinstance(safe, dict) else safe
    return f"{key}={json.dumps(safe)}"
