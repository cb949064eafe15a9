"""What a group of workers waits for on a cluster that is busy: what it needs, what is free, who holds the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import placement_group_table

from areal_ray.cluster.ray_internals import free_resources

_NAMED = 4  # holders that are named


def room(needed: int, worker: Mapping[str, float], own: str) -> str:
    """Describes the cluster's room for so many workers; the answers of the head node grow with nodes and groups.

    Args:
        needed: workers.
        worker: resources of each.
        own: id of the placement group that waits, in hexadecimal.

    Raises:
        RayError, ConnectionError: while the head node is away.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    free, groups = free_resources(), placement_group_table()
    others = {each["name"] or key: each for key, each in groups.items() if key != own and each["state"] == "CREATED"}
    return describe(needed, worker, [node["Resources"] for node in alive], list(free.values()), others)


def describe(
    needed: int,
    worker: Mapping[str, float],
    nodes: list[Mapping[str, float]],
    free: list[Mapping[str, float]],
    others: Mapping[str, Mapping[str, Any]],
) -> str:
    """The sentence for what `room` has asked.

    Args:
        needed, worker: as for `room`.
        nodes, free: resources of every node, all of them and those that nobody uses.
        others: placement groups of others, by name, as Ray's table has them.
    """
    names = [name for name, amount in worker.items() if amount > 0]
    parts = []
    for name in names:
        there, unused = _sum(nodes, name), _sum(free, name)
        held = {key: amount for key, each in others.items() if (amount := _sum(each["bundles"].values(), name))}
        rest = there - unused - sum(held.values())
        holders = [f"placement group {key} holds {amount:g}" for key, amount in list(held.items())[:_NAMED]]
        holders += [f"{len(held) - _NAMED} more placement groups"] if len(held) > _NAMED else []
        holders += [f"actors and tasks hold {rest:g}"] if rest > 0 else []
        parts.append(f"{unused:g} of {there:g} {name} free ({', '.join(holders) or 'nothing is held'})")
    wanted = {name: worker[name] for name in names}
    return f"waiting for room: needed are {needed} workers of {wanted}; {'; '.join(parts)} on {len(nodes)} nodes"


def _sum(resources: Any, name: str) -> float:
    return float(sum(each.get(name, 0.0) for each in resources))
