"""Index of a ledger: the few events that a start asks for, so that it need not read what a month of saves has left."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from typing import Any

from areal_ray.run.logs.event_log import Log
from areal_ray.run.logs.log_lines import Line
from areal_ray.run.logs.log_schema import is_event
from areal_ray.storage import Storage

# Kinds of which every event counts, as long as the run lasts.
HISTORY = (
    "bad_step",
    "poison_step",
    "passed_over",
    "bad_device",
    "other_versions",
    "readmitted",
    "fault",
    "spare_standbys",
    "restore_died",
)
# Kinds of which the newest event counts; of `stuck` those of the newest attempt.
STOPPED_EARLY = "stopped_early"
NEWEST = (
    *("submitted", "group", "attempt", "started", "restoring", "restored", "training", "failure", "save_interval"),
    STOPPED_EARLY,
)
_WANTED = re.compile(rb'"event": ?"(?:%s)"' % "|".join((*HISTORY, *NEWEST, "stuck")).encode())


class EventIndex:
    """The events of a few kinds, of a ledger of any length; a file beside it says how far it has been read.

    That file is never trusted over the ledger: it is left aside if it is torn, or is of another ledger than this one,
    and what the ledger has beyond it is read. It may be deleted at any time. Of the number of the newest attempt the
    higher counts: should the ledger have lost it, no number is given twice.

    Args:
        storage: the run directory.
        name: of the file.
        log: the ledger.
    """

    def __init__(self, storage: Storage, name: str, log: Log) -> None:
        self._storage, self._name, self._log = storage, name, log
        self._lock = threading.Lock()
        self._seen: dict[str, Any] | None = None  # of the ledger; None: the file has not been read
        self._events: list[Line] = []
        self._attempts = 0  # numbers that were given to attempts
        self._written: tuple[dict[str, Any], int] = {}, 0

    def events(self) -> list[Line]:
        """The events of these kinds, oldest first. Reads what the ledger has more than the last time."""
        with self._lock:
            self._read_on()
            return list(self._events)

    def last_attempt(self) -> int:
        """The highest number of an attempt that any event names, or that was given to one."""
        with self._lock:
            self._read_on()
            return max([self._attempts, *(event.get("attempt", 0) for event in self._events)])

    def write(self, attempts: int = 0) -> None:
        """Bring the file up to date (OSError).

        Args:
            attempts: the highest number that was given to one.
        """
        with self._lock:
            seen = self._read_on()
            self._attempts = max(self._attempts, attempts)
            if (seen, self._attempts) != self._written:
                content = {"seen": seen, "events": self._events, "attempts": self._attempts}
                self._storage.replace(self._name, json.dumps(content).encode())
                self._written = seen, self._attempts

    def _read_on(self) -> dict[str, Any]:
        if self._seen is None:
            self._events, self._seen, self._attempts = self._read()
            self._written = self._seen, self._attempts
        found = self._log.since(self._seen, _WANTED)
        if found is None:
            self._events, found = [], self._log.since({}, _WANTED)
            assert found is not None
        lines, self._seen = found
        if lines:
            self._events = _reduce(self._log.sort(self._events + lines))
        return self._seen

    def _read(self) -> tuple[list[Line], dict[str, Any], int]:
        try:
            found = json.loads(self._storage.read(self._name))
            events, seen, attempts = found["events"], dict(found["seen"]), found.get("attempts", 0)
            if not all(type(event) is dict and is_event(event) for event in events):
                raise ValueError("other than events")
            return _reduce(events), seen, attempts if type(attempts) is int and 0 <= attempts < 10**9 else 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return [], {}, 0  # none, none that can be read, or not one of these


def _reduce(events: Sequence[Line]) -> list[Line]:
    """The events that count."""
    newest: dict[str, Line] = {}
    for event in events:
        kind = event["event"]
        if kind in NEWEST and not (kind == "attempt" and event["attempt"] < newest.get(kind, event)["attempt"]):
            newest[kind] = event
    attempt = newest["attempt"]["attempt"] if "attempt" in newest else 0

    def counts(event: Line) -> bool:
        kind = event["event"]
        return kind in HISTORY or event is newest.get(kind) or (kind == "stuck" and event["attempt"] >= attempt)

    return [event for event in events if counts(event)]
