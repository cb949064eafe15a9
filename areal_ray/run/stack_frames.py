"""The line of a stack that is shown: the innermost one of the user's code."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LIBRARY = re.compile(r"/(site|dist)-packages/|/lib/python3\.\d+/|<frozen ")


def innermost(frames: Sequence[tuple[str, int | str, str]]) -> str:
    """The innermost frame that is in no library, else the innermost of all; "" if there is none.

    Args:
        frames: (file, line, function), innermost last.

    Returns:
        "file:line in function".
    """
    own = [frame for frame in frames if not _LIBRARY.search(frame[0])] or list(frames)
    return f"{own[-1][0]}:{own[-1][1]} in {own[-1][2]}" if own else ""
