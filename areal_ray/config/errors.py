"""The error of a wrong configuration."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A user's mistake in the configuration: one line that says where and what.

    Args:
        key: the dotted key, "" when the file as a whole is at fault.
        message: what is wrong with it, and what would be right.
        source: the file, or "command line"; filled in by `load` when the raiser does not know it.
    """

    def __init__(self, key: str, message: str, source: str = "") -> None:
        self.key, self.message, self.source = key, message, source
        super().__init__(": ".join(part for part in (source, key, message) if part))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.message, self.source), self.__dict__
