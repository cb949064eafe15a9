"""Index of a ledger: the few events that a start asks for, so that it need not read what a month of saves has left."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from typing import Any

from areal_ray.run.event_log import Log
from areal_ray.run.log_lines import Line
from areal_ray.storage import Storage

# Kinds of which every event counts, as long as the run lasts.
HISTORY = ("bad_step", "poison_step", "passed_over", "bad_device", "readmitted", "fault", "spare_standbys")
# Kinds of which the newest event counts; of `stuck` those of the newest attempt.
NEWEST = ("submitted", "group", "attempt", "started", "restored", "training", "failure", "save_interval")
_WANTED = re.compile(rb'"event": ?"(?:%s)"' % "|".join((*HISTORY, *NEWEST, "stuck")).encode())


class EventIndex:
    """The events of a few kinds, of a ledger of any length; a file beside it says how far it has been read.

    That file is never trusted over the ledger: it is left aside if it is torn, or is of another ledger than this one,
    and what the ledger has beyond it is read. It may be deleted at any time.

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
        self._written: dict[str, Any] = {}

    def events(self) -> list[Line]:
        """The events of these kinds, oldest first. Reads what the ledger has more than the last time."""
        with self._lock:
            self._read_on()
            return list(self._events)

    def write(self) -> None:
        """Bring the file up to date (OSError)."""
        with self._lock:
            seen = self._read_on()
            if seen != self._written:
                self._storage.replace(self._name, json.dumps({"seen": seen, "events": self._events}).encode())
                self._written = seen

    def _read_on(self) -> dict[str, Any]:
        if self._seen is None:
            self._events, self._seen = self._read()
            self._written = self._seen
        found = self._log.since(self._seen, _WANTED)
        if found is None:
            self._events, found = [], self._log.since({}, _WANTED)
            assert found is not None
        lines, self._seen = found
        if lines:
            self._events = _reduce(self._log.sort(self._events + lines))
        return self._seen

    def _read(self) -> tuple[list[Line], dict[str, Any]]:
        try:
            found = json.loads(self._storage.read(self._name))
            return _reduce(found["events"]), dict(found["seen"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or not one of these
            return [], {}


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
