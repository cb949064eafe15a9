"""The run directory: config, metrics, ledger and result of one run, beside its checkpoints."""

from __future__ import annotations

import json
import time
from typing import Any

from areal_ray.storage import Storage

CONFIG, METRICS, EVENTS, RESULT = "config.yaml", "metrics.jsonl", "events.jsonl", "result.json"


class RunDir:
    """Reads and writes the files of a run. Written by rank 0 and by the driver, never by two at once but for events.

    Args:
        storage: `<run.storage_path>/<run.name>`.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def exists(self) -> bool:
        """Whether a run has been here."""
        return bool(self.storage.names())

    def event(self, kind: str, **fields: Any) -> None:
        """Add a line to the ledger, durable on return."""
        self._append(EVENTS, {"time": round(time.time(), 3), "event": kind, **fields})

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The ledger, oldest first; only events of one kind if given."""
        return [event for event in self._lines(EVENTS) if kind in (None, event["event"])]

    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps, in order."""
        return self._lines(METRICS)

    def log_metrics(self, step: int, values: dict[str, Any]) -> None:
        """Add the line of one step."""
        self._append(METRICS, {"step": step, **values})

    def rewind_metrics(self, step: int) -> None:
        """Take back the lines after `step`, which a restored run computes once more: each step stands once."""
        lines = self._lines(METRICS)
        kept = [line for line in lines if line["step"] <= step]
        if len(kept) != len(lines):
            self.storage.replace(METRICS, b"".join(_line(line) for line in kept))

    def write_config(self, text: str) -> None:
        self.storage.replace(CONFIG, text.encode())

    def write_result(self, result: dict[str, Any]) -> None:
        self.storage.replace(RESULT, json.dumps(result, indent=2).encode() + b"\n")

    def result(self) -> dict[str, Any] | None:
        return json.loads(self.storage.read(RESULT)) if self.storage.size(RESULT) is not None else None

    def next_attempt(self, last_saved: int) -> int:
        """A number that no attempt has had.

        Args:
            last_saved: the highest attempt among the checkpoints, should the ledger have been lost.
        """
        return max([event["attempt"] for event in self.events("attempt")] + [last_saved]) + 1

    def _append(self, name: str, values: dict[str, Any]) -> None:
        # A line that a full disk or a power cut tore stays unreadable, but alone.
        self.storage.append(name, (b"\n" if self._is_torn(name) else b"") + _line(values))

    def _is_torn(self, name: str) -> bool:
        if not self.storage.size(name):
            return False
        with self.storage.open(name) as file:
            file.seek(-1, 2)
            return file.read(1) != b"\n"

    def _lines(self, name: str) -> list[dict[str, Any]]:
        if self.storage.size(name) is None:
            return []
        lines = []
        for line in self.storage.read(name).splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue  # torn by a crash in the middle of a write; what it said happened around the crash
        return lines


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
