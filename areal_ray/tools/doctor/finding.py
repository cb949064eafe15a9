"""A finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Args:
        state: ok; note: it will run, but somebody should know; bad: it will not run, or not as it is meant.
        what: that was looked at.
        text: what was found, and what to do about it.
    """

    state: Literal["ok", "note", "bad"]
    what: str
    text: str
