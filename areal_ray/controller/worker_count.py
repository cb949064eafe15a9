"""Number of workers to start, from the room that there is. Plain code, for Ray Train's controller and without it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from areal_ray.cluster.bad_devices import BadNodes
from areal_ray.cluster.requests import Requests, StoppedWhileWaiting
from areal_ray.run import RunDir

_REMIND_S = 30.0  # between two lines about machines that are missing


def room_for(nodes: Iterable[Mapping[str, float]], worker: Mapping[str, float], most: int) -> int:
    """Count the workers, `most` at most, that fit on nodes with these resources."""
    needed = {name: amount for name, amount in worker.items() if amount > 0}
    if not needed:
        return most
    fits = (min(int(node.get(name, 0.0) // amount) for name, amount in needed.items()) for node in nodes)
    return min(most, sum(fits))


class WorkerCount:
    """Chooses the largest usable number of workers that there is room for.

    Args:
        sizes: the numbers that can be used, ascending.
        requests: to the job.
        run: the run directory, for the ledger.
        bad_nodes: left out, for the line that says what is waited for.
        worker: resources of one worker.
        say: prints a line for the user.
        refused_s: time for which fewer workers are tried after some could not be placed, in seconds.
        clock: seconds, of any beginning.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        requests: Requests,
        run: RunDir,
        bad_nodes: BadNodes,
        worker: Mapping[str, Any],
        say: Callable[[str], None],
        refused_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sizes, self._requests, self._run, self._worker, self._say = list(sizes), requests, run, worker, say
        self._bad_nodes, self._refused_s, self._clock = bad_nodes, refused_s, clock
        self._reminded = self._refused = self._not_before = float("-inf")
        self._tried = 0
        self._limit = self.sizes[-1]  # so many could be placed, for all that is known

    def check_stop(self) -> None:
        """Raise StoppedWhileWaiting if the job is asked to stop, and take back a request to resize: nothing runs."""
        if self._requests.asked() == "stop":
            raise StoppedWhileWaiting("asked to stop while waiting for machines")
        self._requests.clear_resize()

    def choose(self, room: int) -> int | None:
        """Choose how many workers to start; None to wait.

        Args:
            room: workers that the nodes are large enough for.
        """
        now = self._clock()
        if now < self._not_before:
            return None
        if now - self._refused < self._refused_s:  # there is less room than the nodes' sizes say
            room = min(room, self._limit)
        usable = [size for size in self.sizes if size <= room]
        if usable:
            self._tried, self._reminded = usable[-1], float("-inf")
            return self._tried
        self._remind(room)
        return None

    def try_fewer(self) -> int:
        """Choose fewer workers for a while, as the last number could not be placed; returns that number."""
        self._refused = self._clock()
        self._limit = max((size for size in self.sizes if size < self._tried), default=self._tried)
        return self._tried

    def try_all(self) -> None:
        """Forget that some could not be placed."""
        self._refused = float("-inf")

    def hold_back(self, seconds: float) -> None:
        """Start no workers for so long."""
        self._not_before = self._clock() + seconds

    def _remind(self, room: int) -> None:
        now = self._clock()
        if now - self._reminded < _REMIND_S:
            return
        left_out = self._bad_nodes.explain()
        text = f"waiting: the cluster has room for {room} workers of {self._worker}, needed are {self.sizes[0]}"
        self._say(f"{text}; {left_out}" if left_out else text)
        if self._reminded == float("-inf"):
            self._run.note("waiting", self._say, room=room, needed=self.sizes[0])
        self._reminded = now
