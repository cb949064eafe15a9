"""Watch over restores: writes down which checkpoint workers were restoring when one of them died."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from areal_ray.cluster.failures import root_cause
from areal_ray.run import RunDir
from areal_ray.run.restore_deaths import LIMIT, being_restored, times_in_a_row

# Of the node, and not of what the process did: as Ray's messages say it.
_OF_THE_NODE = re.compile(r"node (has |was |is )?(died|dead|terminated|preempted|drained)|NODE_(DIED|TERMINATED)", re.I)


class RestoreWatch:
    """Counts deaths of workers in the restore of a checkpoint, see `run.restore_deaths`.

    Args:
        run: the run directory.
        say: prints a line for the user.
    """

    def __init__(self, run: RunDir, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._ended = 0  # the newest attempt that is known to have ended

    def record(self, workers: Mapping[int, Exception], lost_node: bool) -> None:
        """Take note that workers have failed: by a death of a process, or by something else.

        Args:
            workers: their exceptions, by rank.
            lost_node: whether a node was taken away, which says nothing of a checkpoint.

        Raises:
            OSError: if the ledger cannot be read.
        """
        events = self._run.turning_points()
        restoring = being_restored(events, self._ended)
        numbers = [event["attempt"] for event in events if event["event"] == "attempt"]
        self._ended = max([self._ended, *numbers])
        if restoring is None or lost_node:
            return
        cause = root_cause(dict(workers))
        if not cause.is_death or any(_OF_THE_NODE.search(str(error)) for error in workers.values()):
            return
        name = restoring["checkpoint"]
        times = times_in_a_row(events, name) + 1
        self._say(f"a worker died while {name} was being restored ({times} of {LIMIT} times, then it is passed over)")
        about = {"attempt": restoring["attempt"], "checkpoint": name, "times": times}
        about |= {"rank": cause.rank, "error": cause.message[:500]}
        self._run.note("restore_died", self._say, **about)
