"""Ray Train's scaling policy, extended: as many workers as the live nodes have room for, more when machines come back.

Ray's own counts nodes that have died, tears workers down without notice, and waits without a word.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from areal_ray.cluster.bad_devices import BadNodes
from areal_ray.cluster.console import say
from areal_ray.cluster.nodes import is_reachable
from areal_ray.cluster.ray_internals import draining_nodes, free_resources
from areal_ray.cluster.requests import AWAY, Requests
from areal_ray.controller.worker_count import WorkerCount, room_for

_ASK_AT_ONCE = 64  # nodes


class ScalingPolicy(ElasticScalingPolicy):
    """Starts the number of workers that a WorkerCount chooses, and has them leave when a larger one would fit.

    Args:
        scaling_config: with resources per worker.
        count: of workers.
        bad_nodes: on which no worker is put.
        requests: to the job, to have running workers make room for more.
        look_s: time between two looks for more machines, in seconds.
        pause_s: time between two looks while nothing runs, in seconds.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        count: WorkerCount,
        bad_nodes: BadNodes,
        requests: Requests,
        look_s: float = 5.0,
        pause_s: float = 0.5,
    ) -> None:
        super().__init__(scaling_config)
        self._count, self._bad_nodes, self._requests = count, bad_nodes, requests
        self._look_s, self._pause_s = look_s, pause_s
        self._looked = float("-inf")
        self._resize_to = self._larger = 0
        self._requested = False

    @cached_property
    def _other_jobs(self) -> OtherJobs:
        return OtherJobs()

    def _get_num_workers_for_resource_request(self) -> int:
        return self._count.sizes[-1]

    def _send_resource_request(self) -> None:
        """Nothing: Ray calls this when the controller starts, and waits for an actor; see `_request_machines`."""

    def _request_machines(self) -> None:
        """Tell an autoscaler, if there is one, how many there should be."""
        self._requested = True
        self.scaling_config.label_selector = self._bad_nodes.labels(ray.nodes)  # or it takes these for room enough
        self._maybe_send_resource_request()

    def on_controller_start_worker_group(self, *, scaling_config: ScalingConfig, num_workers: int) -> Any:
        """Choose the label selector of all workers, for Ray Train."""
        return self._bad_nodes.labels(ray.nodes)

    def _cancel_resource_request(self) -> None:
        if self._requested:  # or the actor would be started for it
            super()._cancel_resource_request()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._resize_to = self._larger = 0
        try:
            self._count.check_stop()
            room = self._room(ask=True)
            if room < self._count.sizes[-1]:
                self._request_machines()
        except AWAY as error:
            say(f"the head node does not answer: {error}")
            time.sleep(self._look_s)
            return NoopDecision()
        chosen = self._count.choose(room)
        if chosen is None:
            time.sleep(self._pause_s)  # the controller would ask again at once
            return NoopDecision()
        return self._get_resize_decision(chosen)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        running, most, now = worker_group_state.num_workers, self._count.sizes[-1], time.monotonic()
        if now - worker_group_state.start_time < self._look_s or now - self._looked < self._look_s:
            return NoopDecision()
        self._looked = now
        try:
            # With all that it wants, too, once others have asked: an autoscaler adds up what all jobs ask for.
            if running < most or self._other_jobs.ask:
                self._request_machines()
            if running == most or self._resize_to:
                return NoopDecision()
            room = min(self._room(), running + self._free())
            larger = max((size for size in self._count.sizes if running < size <= room), default=0)
            # Twice in a row: a node that has just come may not have come to stay.
            if larger and larger == self._larger:
                say(f"there is room for {larger} workers instead of {running}: saving, then going on with them")
                self._requests.ask("resize")
                self._resize_to = larger
                self._count.try_all()  # a number that was too much once fits now
            self._larger = larger
        except AWAY:  # the head node; training goes on without it, and the next look may find it
            self._larger = 0
        return NoopDecision()

    def _room(self, ask: bool = False) -> int:
        """How many workers the live nodes are large enough for, whoever else is there.

        Args:
            ask: the nodes themselves. The head node takes up to half a minute to notice that one has died without a
                word, and workers would be decided upon that cannot be placed.
        """
        there = ray.nodes()
        avoided = draining_nodes().keys() | self._bad_nodes.ids(lambda: there)
        nodes = [node for node in there if node["Alive"] and node["NodeID"] not in avoided]
        if ask:
            with ThreadPoolExecutor(_ASK_AT_ONCE) as pool:
                answers = pool.map(is_reachable, [f"{n['NodeManagerAddress']}:{n['NodeManagerPort']}" for n in nodes])
            nodes = [node for node, answer in zip(nodes, answers, strict=True) if answer]
        return self._fitting({node["NodeID"]: node["Resources"] for node in nodes})

    def _free(self) -> int:
        """For how many more there is room beside everything that runs now."""
        avoided = draining_nodes().keys() | self._bad_nodes.ids(ray.nodes)
        return self._fitting({name: free for name, free in free_resources().items() if name not in avoided})

    def _fitting(self, nodes: Mapping[str, Mapping[str, float]]) -> int:
        worker = self.scaling_config._resources_per_worker_not_none
        return room_for(nodes.values(), worker, self._count.sizes[-1])


class OtherJobs:
    """Whether any job on this cluster has asked an autoscaler for machines yet: `ask`.

    Looked at in the background, as the head node may be away.

    Args:
        look_s: time between two looks, in seconds.
        find_actor: raises ValueError if there is no actor of that name and namespace.
    """

    def __init__(self, look_s: float = 20.0, find_actor: Callable[..., Any] = ray.get_actor) -> None:
        self.ask = False
        self._look_s, self._find_actor = look_s, find_actor
        self._thread = threading.Thread(target=self._look, name="other jobs", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not (ask := self._somebody_has_asked()):
            time.sleep(self._look_s)
        self.ask = ask

    def _somebody_has_asked(self) -> bool:
        """Whether there is the actor by which jobs ask; it outlives them."""
        with suppress(ValueError, *AWAY):  # ValueError: there is none
            self._find_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")  # as Ray Data names it
            return True
        return False
