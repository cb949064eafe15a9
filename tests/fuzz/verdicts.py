"""Verdicts on what the product did with a case: which outcomes there are, and which of them must not be."""

from __future__ import annotations

import linecache
import sys
import traceback
from dataclasses import dataclass
from io import StringIO
from typing import Any

from areal_ray.distributed import RankError

RIGHT = "right"  # the state that was saved, or a config
OLDER = "older"  # the next older checkpoint, bit for bit
FORGED = "as forged"  # what a writer of right checksums has put there, whole
REFUSED = "one line"  # an error that says in one line what is wrong
GOOD = (RIGHT, OLDER, FORGED, REFUSED)
WRONG, TRACEBACK, HANG, MEMORY, CRASH = "loaded wrong", "traceback", "hang", "memory", "crash"
BAD = (WRONG, TRACEBACK, HANG, MEMORY, CRASH)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "std::bad_alloc", "Unable to allocate")


@dataclass(frozen=True)
class Verdict:
    """Outcome of a case.

    Args:
        what: one of GOOD or BAD.
        text: of an error, or what is wrong.
    """

    what: str
    text: str = ""


class Bad(Exception):
    """Something that must not be; ends a case with its verdict."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(text)
        self.verdict = Verdict(what, text)


def of_error(error: BaseException) -> Verdict:
    """The verdict on an exception that would end the run, or a command.

    It must be one that the product raises itself, by a `raise` in its code, with a text of one line: what Python, numpy
    or torch raise on bytes that nobody has looked at is a traceback, even if it happens to be a ValueError.
    """
    cause = error.__cause__ if isinstance(error, RankError) and error.__cause__ is not None else error
    text = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, MemoryError) or any(words in text for words in _NO_MEMORY):
        return Verdict(MEMORY, _where(cause, text))
    if isinstance(cause, ValueError | RuntimeError) and _is_raised(cause) and len(str(error).splitlines()) == 1:
        return Verdict(REFUSED, text)
    return Verdict(TRACEBACK, _where(cause, text))


def _is_raised(error: BaseException) -> bool:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return "/areal_ray/" in frame.filename and line.startswith("raise")


def _where(error: BaseException, text: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return f"{text[:300]}\n" + "\n".join(
        f"      {each.filename}:{each.lineno} {each.name}: {each.line}" for each in frames
    )


class Errors(StringIO):
    """Standard error of a command; keeps the exception that a command tells of while it handles it."""

    handled: BaseException | None = None

    def write(self, text: str) -> int:
        self.handled = self.handled or sys.exc_info()[1]
        return super().write(text)


def of_command(status: Any, out: str, errors: Errors, prefix: str) -> Verdict:
    """The verdict on a command that has ended.

    Args:
        status: its exit status.
        out, errors: what it printed.
        prefix: with which the one line on standard error begins.
    """
    lines = errors.getvalue().splitlines()
    if not lines:
        return Verdict(RIGHT, out)
    if len(lines) > 1 or not lines[0].startswith(prefix) or status not in (1, 2):
        return Verdict(TRACEBACK, f"status {status}, {len(lines)} lines: {errors.getvalue()[:500]!r}")
    if isinstance(errors.handled, OSError):  # the system's own words
        return Verdict(REFUSED, lines[0])
    return Verdict(REFUSED, lines[0]) if errors.handled is None else of_error(errors.handled)
