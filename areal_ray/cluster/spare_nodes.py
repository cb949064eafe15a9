"""Standbys on nodes that have none of the job's workers, so that the one that takes over for a lost node is ready."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import ray

from areal_ray.cluster.standbys import prestart

_TRIES = 3
_MOST = 2  # of such nodes: a cluster that has more of them does not have them for this job
_EVENT = "spare_standbys"


def spare_nodes(
    nodes: Iterable[Mapping[str, Any]], occupied: Collection[str], needed: Mapping[str, float]
) -> list[Mapping[str, Any]]:
    """Those of `ray.nodes()` that live, have none of the job's workers, and are large enough for one."""
    return [
        node
        for node in nodes
        if node["Alive"]
        and node["NodeID"] not in occupied
        and all(node["Resources"].get(name, 0) >= amount for name, amount in needed.items())
    ]


class SpareNodes:
    """Has standbys started on spare nodes, on each of them once in the life of a job.

    A node that gets workers sees to its standbys itself from then on, and keeps them when the workers go.

    Args:
        occupied: ids of the nodes of the job's workers.
        count: standbys for each node.
        needed: resources of a worker.
        events: earlier ones of the run's ledger.
        note: writes an event to the ledger.
        complain: prints a line for the user.
        look: the nodes of the cluster.
        look_s: seconds between two looks for nodes that have come.
        start: starts so many standbys on a node, like this process.
    """

    def __init__(
        self,
        occupied: Collection[str],
        count: int,
        needed: Mapping[str, float],
        events: Sequence[Mapping[str, Any]],
        note: Callable[..., None],
        complain: Callable[[str], None],
        look: Callable[[], Iterable[Mapping[str, Any]]] = ray.nodes,
        look_s: float = 20.0,
        start: Callable[[int, Mapping[str, Any]], None] = prestart,
    ) -> None:
        self._occupied, self._count, self._needed = occupied, count, needed
        self._job = ray.get_runtime_context().get_job_id()
        self._asked = {each["node_id"] for each in events if each["event"] == _EVENT and each["job"] == self._job}
        self._note, self._complain, self._look, self._start = note, complain, look, start
        self._look_s = look_s

    def replenish(self) -> None:
        """Look now and then, in the background, as long as this process lives."""
        threading.Thread(target=self._go_on, name="spare nodes", daemon=True).start()

    def _go_on(self) -> None:
        refusals = 0  # one after the other: a node that has just died is no reason to give up
        while refusals < _TRIES:
            try:
                self.look()
                refusals = 0
            except Exception as error:  # noqa: BLE001  (the call is internal to Ray; whatever it says, training goes on)
                refusals += 1
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if refusals < _TRIES:
                time.sleep(self._look_s)
        self._complain(f"no standbys on spare nodes: {text}")

    def look(self) -> None:
        """Have standbys started on nodes that have come since the last time."""
        spare = spare_nodes(self._look(), self._occupied, self._needed)
        if len(spare) > _MOST:
            return
        for node in spare:
            if node["NodeID"] not in self._asked:
                self._start(self._count, node)
                self._asked.add(node["NodeID"])
                self._note(_EVENT, node=node["NodeName"], node_id=node["NodeID"], job=self._job, count=self._count)
