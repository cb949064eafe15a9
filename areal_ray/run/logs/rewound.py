"""Lines that a restore takes back although a later checkpoint is there, which only could not be read this time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from areal_ray.run.logs.event_log import Log
from areal_ray.run.logs.log_lines import Line
from areal_ray.storage import Storage

REWOUND = "rewound.json"


@dataclass(frozen=True)
class Rewindable:
    """A log whose lines a restore takes back.

    Args:
        log: with the lines.
        place: key of the number in each line that grows along the run.
        is_good: whether something is such a line.
    """

    log: Log
    place: str
    is_good: Callable[[Line], bool]


class RewoundLines:
    """Lines of logs, kept beside them until a restore has read that checkpoint, or a later one, after all.

    The run would go on from it with a gap in its logs otherwise. Grows with the steps between the two checkpoints.

    Args:
        storage: the run directory.
        logs: by name.
    """

    def __init__(self, storage: Storage, logs: Mapping[str, Rewindable]) -> None:
        self._storage, self._logs = storage, logs

    def keep(self, after: Mapping[str, int]) -> None:
        """Keep a copy of the lines behind these places; all of the logs is read. To be called before they are cut.

        Raises:
            OSError: if they cannot be written.
        """
        kept, found = self._read() or {}, dict[str, list[Line]]()
        for name, each in self._logs.items():
            behind = (line for line in (*kept.get(name, ()), *each.log.lines()) if line[each.place] > after[name])
            lines = {line[each.place]: line for line in behind}
            found[name] = [lines[place] for place in sorted(lines)]
        self._storage.replace(REWOUND, json.dumps(found).encode())

    def bring_back(self, until: Mapping[str, int]) -> None:
        """Add the lines up to these places that the logs have no longer, and forget the others.

        Raises:
            OSError: if they cannot be read or written.
        """
        if (found := self._read()) is None:
            return
        for name, each in self._logs.items():
            last = max((line[each.place] for line in each.log.tail()), default=-1)
            for line in found[name]:
                if last < line[each.place] <= until[name]:
                    each.log.append(line)
            each.log.flush()
        self._storage.remove(REWOUND)

    def _read(self) -> dict[str, list[Line]] | None:
        """What is kept, without what is damaged of it; None if nothing is."""
        try:
            found = json.loads(self._storage.read(REWOUND))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            found = None
        found = found if type(found) is dict else {}
        kept = {name: found[name] if type(found.get(name)) is list else [] for name in self._logs}
        return {
            name: [line for line in lines if type(line) is dict and self._logs[name].is_good(line)]
            for name, lines in kept.items()
        }
