"""How many workers there are: Ray Train's scaling policy, ours.

Ray's own counts nodes that have died, tears workers down without notice, and waits without a word.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from areal_ray.cluster.console import say
from areal_ray.cluster.nodes import is_reachable
from areal_ray.cluster.requests import AWAY, Control
from areal_ray.run import RunDir

_LOOK_S = 5.0  # between two looks for more machines
_REMIND_S = 30.0  # between two lines about machines that are missing
_OTHERS_S = 20.0  # between two looks for other jobs that ask for machines
_PAUSE_S = 0.5  # between two looks while nothing runs
_ASK_AT_ONCE = 64  # nodes
_REFUSED_S = 300.0  # for so long fewer workers are tried, after some could not be started


class StoppedWhileWaiting(RuntimeError):
    """The job was asked to stop when no worker ran."""


class ScalingPolicy(ElasticScalingPolicy):
    """As many workers as the live nodes have room for, in a number that mesh and global batch can be shared by.

    Args:
        scaling_config: with resources per worker.
        sizes: the numbers that can be used, ascending.
        control: to ask running workers to make room for more.
        run: the run directory, for the ledger.
    """

    def __init__(self, scaling_config: ScalingConfig, sizes: Sequence[int], control: Control, run: RunDir) -> None:
        super().__init__(scaling_config)
        self._sizes, self._control, self._run = list(sizes), control, run
        self._reminded = self._looked = self._refused = self._not_before = float("-inf")
        self._asked = self._seen = self._tried = 0
        self._limit = self._sizes[-1]  # so many could be placed, for all that is known
        self._requested = False

    @cached_property
    def _others(self) -> _Others:
        return _Others()

    def _get_num_workers_for_resource_request(self) -> int:
        return self._sizes[-1]

    def _send_resource_request(self) -> None:
        """Nothing: Ray calls this when the controller starts, and waits for an actor; see `_request_machines`."""

    def _request_machines(self) -> None:
        """Tell an autoscaler, if there is one, how many there should be."""
        self._requested = True
        self._maybe_send_resource_request()

    def _cancel_resource_request(self) -> None:
        if self._requested:  # or the actor would be started for it
            super()._cancel_resource_request()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._asked = self._seen = 0
        try:
            if self._control.asked() == "stop":
                raise StoppedWhileWaiting("asked to stop while waiting for machines")
            self._control.done()
            room = self._room(ask=True)
            if room < self._sizes[-1]:
                self._request_machines()
        except AWAY as error:
            say(f"the head node does not answer: {error}")
            time.sleep(_LOOK_S)
            return NoopDecision()
        now = time.monotonic()
        if now < self._not_before:
            time.sleep(min(_PAUSE_S, self._not_before - now))
            return NoopDecision()
        if now - self._refused < _REFUSED_S:  # there is less room than the nodes' sizes say
            room = min(room, self._limit)
        usable = [size for size in self._sizes if size <= room]
        if usable:
            self._tried, self._reminded = usable[-1], float("-inf")
            return self._get_resize_decision(self._tried)
        self._remind(room)
        time.sleep(_PAUSE_S)  # the controller would ask again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        running, now = worker_group_state.num_workers, time.monotonic()
        if now - worker_group_state.start_time < _LOOK_S or now - self._looked < _LOOK_S:
            return NoopDecision()
        self._looked = now
        try:
            # With all that it wants, too, once others have asked: an autoscaler adds up what all jobs ask for.
            if running < self._sizes[-1] or self._others.ask:
                self._request_machines()
            if running == self._sizes[-1] or self._asked:
                return NoopDecision()
            room = min(self._room(), running + self._free())
            better = max((size for size in self._sizes if running < size <= room), default=0)
            if better and better == self._seen:  # twice in a row: a node that has just come may not have come to stay
                say(f"there is room for {better} workers instead of {running}: saving, then going on with them")
                self._control.ask("resize")
                self._asked, self._refused = better, float("-inf")  # what was too much once fits now
            self._seen = better
        except AWAY:  # the head node; training goes on without it, and the next look may find it
            self._seen = 0
        return NoopDecision()

    def not_placed(self) -> int:
        """The workers that were decided upon could not be started; try fewer for a while. How many were tried."""
        self._refused = time.monotonic()
        self._limit = max((size for size in self._sizes if size < self._tried), default=self._tried)
        return self._tried

    def hold(self, seconds: float) -> None:
        """Start no workers for so long."""
        self._not_before = time.monotonic() + seconds

    def _room(self, ask: bool = False) -> int:
        """How many workers the live nodes are large enough for, whoever else is there.

        Args:
            ask: the nodes themselves. The head node takes up to half a minute to notice that one has died without a
                word, and workers would be decided upon that cannot be placed.
        """
        leaving = ray._private.state.state.get_draining_nodes()
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
        if ask:
            with ThreadPoolExecutor(_ASK_AT_ONCE) as pool:
                there = pool.map(is_reachable, [f"{n['NodeManagerAddress']}:{n['NodeManagerPort']}" for n in nodes])
            nodes = [node for node, answer in zip(nodes, there, strict=True) if answer]
        return int(self._count_possible_workers({node["NodeID"]: node["Resources"] for node in nodes}))

    def _free(self) -> int:
        """For how many more there is room beside everything that runs now."""
        leaving = ray._private.state.state.get_draining_nodes()
        free = ray._private.state.available_resources_per_node()
        return int(self._count_possible_workers({name: r for name, r in free.items() if name not in leaving}))

    def _remind(self, room: int) -> None:
        now = time.monotonic()
        if now - self._reminded < _REMIND_S:
            return
        needed = self.scaling_config._resources_per_worker_not_none
        say(f"waiting: the cluster has room for {room} workers of {needed}, needed are {self._sizes[0]}")
        if self._reminded == float("-inf"):
            self._run.note("waiting", say, room=room, needed=self._sizes[0])
        self._reminded = now


class _Others:
    """Whether any job on this cluster has asked an autoscaler for machines yet: `ask`.

    Looked at in the background, as the head node may be away.
    """

    def __init__(self) -> None:
        self.ask = False
        self._thread = threading.Thread(target=self._look, name="others", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not (ask := _somebody_has_asked()):
            time.sleep(_OTHERS_S)
        self.ask = ask


def _somebody_has_asked() -> bool:
    """Whether there is the actor by which jobs ask; it outlives them."""
    with suppress(ValueError, *AWAY):  # ValueError: there is none
        ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")  # as Ray Data names it
        return True
    return False
