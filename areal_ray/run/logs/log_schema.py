"""Checks of log lines: whether a line is one that this package wrote, as far as anybody relies on it.

A flipped bit or a foreign hand leaves lines that are JSON and still no event: a number for a name, a key misspelt. Such
a line is left out as a torn one is, and no reader has to ask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]
_MOST = 10**9  # of what counts steps, attempts or ranks


def _number(value: Any) -> bool:
    return type(value) in (int, float) and value == value


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _text(value: Any) -> bool:
    return type(value) is str


def _dict(value: Any) -> bool:
    return type(value) is dict


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: type(value) is list and all(map(check, value))


# The type of a field, in whatever event it stands; one that is not here is asked for by nobody.
_FIELDS: dict[str, Check] = {
    "time": _number,
    "seconds": _number,
    "observed_s": _number,
    "blocked_s": _number,
    "attempt": _count,
    "world_size": _count,
    "reached": _count,
    "failures": _count,
    "failure": _count,
    "times": _count,
    "step": _or_none(_count),
    "rank": _or_none(_count),
    "nodes": _list_of(_text),
    "pids": _list_of(_count),
    "checkpoint": _or_none(_text),
    "where": _or_none(_text),
    "collectives": _or_none(_dict),
    "driver": _dict,
    "versions": _dict,
} | dict.fromkeys(
    ("action", "cause", "error", "fault", "job", "node", "node_id", "phase", "problem", "reason", "uuid"), _text
)

# What each kind of event is asked for, and would be no event of its kind without.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "submitted": ("time",),
    "attempt": ("attempt",),
    "restoring": ("attempt", "checkpoint"),
    "restore_died": ("attempt", "checkpoint", "times"),
    "failure": ("time", "rank"),
    "stuck": ("attempt", "rank", "waiting"),
    "bad_step": ("step",),
    "poison_step": ("step",),
    "passed_over": ("checkpoint",),
    "bad_device": ("node", "uuid", "index", "failure", "problem"),
    "other_versions": ("node", "problem", "driver"),
    "readmitted": ("node",),
    "fault": ("fault",),
    "spare_standbys": ("node_id", "job"),
    "save_interval": ("time", "failures", "observed_s", "cost_s"),
    "left": ("reason",),
    "stopped_early": ("step",),
    "save_began": ("checkpoint",),
}
_NEVER_NONE = {
    **dict.fromkeys(("bad_step", "poison_step", "restored", "started"), "step"),
    **dict.fromkeys(("restoring", "restore_died", "passed_over", "saved", "save_began"), "checkpoint"),
    "stuck": "rank",
}


def is_event(line: Mapping[str, Any]) -> bool:
    """Whether a line of the ledger is an event."""
    kind = line.get("event")
    if type(kind) is not str or not all(name in line for name in _REQUIRED.get(kind, ())):
        return False
    if kind in _NEVER_NONE and line.get(_NEVER_NONE[kind], 0) is None:
        return False
    for name, value in line.items():
        check = _FIELDS.get(name) or (_or_none(_number) if name.endswith("_s") else None)
        if check is not None and not check(value):
            return False
    return True


def is_metric(line: Mapping[str, Any]) -> bool:
    """Whether a line of the metrics is that of a step."""
    seconds, loss = line.get("step_time_s", 0), line.get("held_out_loss", 0)
    return _count(line.get("step")) and _number(seconds) and type(loss) in (int, float)


def is_batch(line: Mapping[str, Any]) -> bool:
    """Whether a line of the samples is that of a global batch."""
    return _count(line.get("first")) and _list_of(lambda value: type(value) is int)(line.get("ids"))
