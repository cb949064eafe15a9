"""Fence of a run directory: who has lost it to a newer job or a newer attempt writes nothing any more.

A driver that was stopped longer than its lease, or workers at the far side of a network that was cut, go on as if
nothing had happened, and storage takes what they write. So every writer asks before it writes, and the newest one has
said so before it began.
"""

from __future__ import annotations

import json
from typing import Any

from areal_ray.storage import Storage

FENCE = "fence.json"


class RunTaken(RuntimeError):
    """Raised by who writes to a run directory that another job, or a newer attempt of its own job, works on."""


class Fence:
    """Compares a writer with the newest one, which stands in a small file.

    The newest job writes it when it has the lease, and each of its attempts when it begins. To check costs one small
    read, one request on object storage, whatever the length of the run.

    Args:
        run: the run directory.
        job: identifier of this job; None for who only reads, or has no lease (a tool, a test): it is never refused.
    """

    def __init__(self, run: Storage, job: str | None) -> None:
        self._run, self.job = run, job
        self._attempt: int | None = None  # None: of no attempt, such as the driver

    def take(self) -> None:
        """Shut all other jobs out, as the holder of the lease (OSError)."""
        self._write(0)

    def begin(self, attempt: int) -> None:
        """Shut earlier attempts of this job out (OSError).

        Raises:
            RunTaken: as `check`.
        """
        try:
            self.check()
        finally:  # also where it cannot be read just now: it is an attempt from here on, and asks again
            self._attempt = attempt
        if self.job is not None:
            self._write(attempt)

    def check(self) -> None:
        """Raise RunTaken if there is a newer job or attempt than this one (OSError if the storage is away)."""
        if self.job is None:
            return
        newest = self._read()
        job, attempt = newest.get("job"), newest.get("attempt")
        where = self._run.location
        if isinstance(job, str) and job != self.job:
            raise RunTaken(f"another job has taken {where} over: this one writes nothing any more")
        if isinstance(attempt, int) and self._attempt is not None and attempt > self._attempt:
            raise RunTaken(f"attempt {attempt} has taken {where} over: {self._attempt} writes nothing any more")

    def _write(self, attempt: int) -> None:
        self._run.replace(FENCE, json.dumps({"job": self.job, "attempt": attempt}).encode() + b"\n")

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._run.read(FENCE))
        except (FileNotFoundError, ValueError, RecursionError):  # none, or not one of these: it shuts nobody out
            return {}
        return found if isinstance(found, dict) else {}
