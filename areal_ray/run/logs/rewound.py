"""Lines that a restore takes back although a later checkpoint is there, which only could not be read this time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from areal_ray.run.logs.event_log import Log
from areal_ray.storage import Storage

Line = dict[str, Any]
REWOUND = "rewound.json"


class RewoundLines:
    """Lines of logs, kept beside them until a restore has read that checkpoint, or a later one, after all.

    The run would go on from it with a gap in its logs otherwise. Grows with the steps between the two checkpoints.

    Args:
        storage: the run directory.
        logs: by name, each with what gives the place of a line: a number that grows along the run.
    """

    def __init__(self, storage: Storage, logs: Mapping[str, tuple[Log, Callable[[Line], int]]]) -> None:
        self._storage, self._logs = storage, logs

    def keep(self, after: dict[str, int]) -> None:
        """Keep a copy of the lines behind these places; all of the logs is read. To be called before they are cut.

        Raises:
            OSError: if they cannot be written.
        """
        found = self._read()
        for name, (log, place) in self._logs.items():
            lines = {place(line): line for line in (*found.get(name, ()), *log.lines()) if place(line) > after[name]}
            found[name] = [lines[at] for at in sorted(lines)]
        self._storage.replace(REWOUND, json.dumps(found).encode())

    def bring_back(self, until: dict[str, int]) -> None:
        """Add the lines up to these places that the logs have no longer, and forget the others.

        Raises:
            OSError: if they cannot be written; another time will do as well.
        """
        if not (found := self._read()):
            return
        for name, (log, place) in self._logs.items():
            last = max(map(place, log.tail()), default=-1)
            for line in _between(found.get(name, ()), place, last, until[name]):
                log.append(line)
            log.flush()
        self._storage.remove(REWOUND)

    def _read(self) -> dict[str, list[Line]]:
        try:
            found: dict[str, list[Line]] = json.loads(self._storage.read(REWOUND))
        except FileNotFoundError:
            return {}
        except ValueError:  # damaged: it is a comfort, not the run
            return {}
        return found


def _between(lines: Iterable[Line], place: Callable[[Line], int], last: int, until: int) -> list[Line]:
    return [line for line in lines if last < place(line) <= until]
