"""Placement groups, kept from one group of workers for the next.

The head node learns from the nodes' next reports that resources have been given back, up to a second later. So long a
restarted group would wait for resources that are free.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import ray
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupContext
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from areal_ray.cluster.console import say
from areal_ray.cluster.ray_internals import node_service, placement_group_id, resource_load
from areal_ray.cluster.requests import AWAY

_LOOK_S = 0.01
_ANSWER_S = 2.0  # of a raylet: one that takes longer is as good as dead
_ASK_AT_ONCE = 64  # nodes
_DEAD = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True)
class _Kept:
    group: PlacementGroup
    shape: Any  # as asked for


class PlacementGroupCache:
    """Reserves placement groups; one that is retained is used again if the next has the same shape.

    But only if all of it is there and free: a node may be gone, or be going, and a process that cannot answer is waited
    for by its raylet for five seconds. Else it is removed, and a new one is reserved.

    Args:
        ending_s: time for the processes of the group before to be gone, in seconds; they take milliseconds.
    """

    def __init__(self, ending_s: float = 1.0) -> None:
        self._ending_s = ending_s
        self._kept: _Kept | None = None

    def acquire(self, context: TrainRunContext, wanted: WorkerGroupContext) -> PlacementGroup:
        """Reserve a placement group; whether there is room shows when one waits for it.

        Raises:
            RayError, ConnectionError: when the head node is away.
        """
        if self._kept is not None:
            kept = self._kept.group
            if self._kept.shape == _shape(wanted) and _is_free(kept, self._ending_s):
                self._kept = None
                return kept
            self._remove()
        # With a name, so that it can be given back when the controller has died.
        name = f"{_prefix(context)}{uuid.uuid4().hex}"
        bundles, strategy, labels = _shape(wanted)
        return placement_group(bundles=bundles, strategy=strategy, name=name, bundle_label_selector=labels)

    def retain(self, group: PlacementGroup, wanted: WorkerGroupContext) -> None:
        """Keep a group that was acquired for `wanted` and that nobody uses any more."""
        self._kept = _Kept(group, _shape(wanted))

    def release(self) -> None:
        """Give back a group that is kept. If the head node is away, the job's end gives it back."""
        try:
            self._remove()
        except AWAY as error:
            say(f"could not give back the placement group of the workers: {error}")

    def _remove(self) -> None:
        if self._kept is not None:
            remove_placement_group(self._kept.group)
            self._kept = None


def release_all(context: TrainRunContext) -> None:
    """Give back the placement groups of a controller that is dead; Ray does so only at the end of the whole job."""
    for identity, entry in placement_group_table().items():
        if entry["name"].startswith(_prefix(context)) and entry["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(placement_group_id(identity)))


def _prefix(context: TrainRunContext) -> str:
    return f"areal_ray-{context.run_id}-"


def _shape(wanted: WorkerGroupContext) -> tuple[list[dict[str, float]], str, list[dict[str, str]] | None]:
    return [wanted.resources_per_worker] * wanted.num_workers, wanted.placement_strategy, wanted.label_selector


def _is_free(group: PlacementGroup, ending_s: float) -> bool:
    """Whether all of it is there, on nodes that stay, and nobody uses it, or will when so many seconds are over."""
    try:
        entry = placement_group_table(group)
        places = set(entry["bundles_to_node_id"].values())
        nodes = [node for node in ray.nodes() if node["NodeID"] in places and node["Alive"]]
        if entry["state"] != "CREATED" or len(nodes) != len(places):
            return False
        until = time.monotonic() + ending_s
        with ThreadPoolExecutor(_ASK_AT_ONCE) as pool:
            return all(pool.map(lambda node: _is_free_on(node, group.id.hex(), until), nodes))
    except Exception as error:  # noqa: BLE001  (internal to Ray; whatever it says, there is the ordinary way)
        say(f"reserving anew, as the nodes could not be asked: {type(error).__name__}: {str(error)[:200]}")
        return False


def _is_free_on(node: Mapping[str, Any], group: str, until: float) -> bool:
    """Ask the node's raylet, again and again until that time."""
    with node_service(node) as service:
        while True:
            try:
                load = resource_load(service, _ANSWER_S)
            except grpc.RpcError as error:
                if error.code() in _DEAD:
                    return False
                raise
            # Of every bundle the raylet has resources of its own, named after the group.
            shares = {name: total for name, total in load.resources_total.items() if name.endswith(group)}
            if not shares or load.is_draining:
                return False
            if all(load.resources_available[name] == total for name, total in shares.items()):
                return True
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK_S)
