"""What a group of workers has reserved, kept for the group that comes next.

That resources have been given back the head node learns from the nodes' next reports, up to a second later, and so long
a restarted group would wait for what is free.
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
from ray._raylet import PlacementGroupID
from ray.core.generated.node_manager_pb2 import GetResourceLoadRequest
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupContext
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from areal_ray.cluster.console import say
from areal_ray.cluster.nodes import raylet
from areal_ray.cluster.requests import AWAY

_GONE_S = 1.0  # so long the processes of the group before are waited for; it takes them milliseconds
_LOOK_S = 0.01
_ANSWER_S = 2.0  # of a raylet: one that takes longer is as good as dead
_ASK_AT_ONCE = 64  # nodes
_DEAD = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True)
class _Kept:
    group: PlacementGroup
    what: Any  # that was asked for


class PlacementGroupCache:
    """Reserves for one group after the other; the next one gets what the last one had, if it wants the same.

    But only if all of it is there and free: a node may be gone, or be going, and a process that cannot answer is waited
    for by its raylet for five seconds. Then it is given back, and what is there is reserved anew.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def acquire(self, context: TrainRunContext, wanted: WorkerGroupContext) -> PlacementGroup:
        """Reserve; whether there is room shows when one waits for what this returns.

        Raises:
            RayError, ConnectionError: when the head node is away.
        """
        if self._kept is not None:
            kept = self._kept.group
            if self._kept.what == _what(wanted) and _is_free(kept):
                self._kept = None
                return kept
            self._remove()
        # With a name, so that it can be given back when the controller has died.
        name = f"{_prefix(context)}{uuid.uuid4().hex}"
        bundles, strategy, labels = _what(wanted)
        return placement_group(bundles=bundles, strategy=strategy, name=name, bundle_label_selector=labels)

    def retain(self, group: PlacementGroup, wanted: WorkerGroupContext) -> None:
        """Nobody uses this any more; it was taken for `wanted`."""
        self._kept = _Kept(group, _what(wanted))

    def release(self) -> None:
        """Keep nothing. If the head node is away, the job's end gives it back."""
        try:
            self._remove()
        except AWAY as error:
            say(f"could not give back what the workers had: {error}")

    def _remove(self) -> None:
        if self._kept is not None:
            remove_placement_group(self._kept.group)
            self._kept = None


def release_all(context: TrainRunContext) -> None:
    """Give back what the groups of a controller held that is dead; Ray does so only at the end of the whole job."""
    for identity, entry in placement_group_table().items():
        if entry["name"].startswith(_prefix(context)) and entry["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(identity)))


def _prefix(context: TrainRunContext) -> str:
    return f"areal_ray-{context.run_id}-"


def _what(wanted: WorkerGroupContext) -> tuple[list[dict[str, float]], str, list[dict[str, str]] | None]:
    return [wanted.resources_per_worker] * wanted.num_workers, wanted.placement_strategy, wanted.label_selector


def _is_free(group: PlacementGroup) -> bool:
    """Whether all of it is there, on nodes that stay, and nobody uses it, or will in a moment."""
    try:
        entry = placement_group_table(group)
        places = set(entry["bundles_to_node_id"].values())
        nodes = [node for node in ray.nodes() if node["NodeID"] in places and node["Alive"]]
        if entry["state"] != "CREATED" or len(nodes) != len(places):
            return False
        until = time.monotonic() + _GONE_S
        with ThreadPoolExecutor(_ASK_AT_ONCE) as pool:
            return all(pool.map(lambda node: _is_free_on(node, group.id.hex(), until), nodes))
    except Exception as error:  # noqa: BLE001  (internal to Ray; whatever it says, there is the ordinary way)
        say(f"reserving anew, as the nodes could not be asked: {type(error).__name__}: {str(error)[:200]}")
        return False


def _is_free_on(node: Mapping[str, Any], group: str, until: float) -> bool:
    """Ask the node's raylet, again and again until that time."""
    with raylet(node) as service:
        while True:
            try:
                load = service.GetResourceLoad(GetResourceLoadRequest(), timeout=_ANSWER_S).resources
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
