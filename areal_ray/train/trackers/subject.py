"""The run that a tracker is told about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Subject:
    """A run, as its trackers know it.

    Args:
        id: the same for all starts and submissions of the run, and another one for every other run.
        name: of the run.
        location: of its run directory.
        folder: where a tracker may keep files; None where the run directory is object storage.
        config: resolved, without secrets.
        revision: of the package in git, or "unknown".
    """

    id: str
    name: str
    location: str
    folder: str | None
    config: Mapping[str, Any]
    revision: str

    def folder_for(self, tracker: str, key: str) -> str:
        """The folder of a tracker below the run directory.

        Raises:
            ValueError: if the run directory is object storage.
        """
        if self.folder is None:
            raise ValueError(f"{self.location} is no folder that {tracker} could write to: give args.{key}")
        return f"{self.folder}/{tracker}"
