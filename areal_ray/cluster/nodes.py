"""Nodes of a cluster: their names, and whether they can be reached."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

_CONNECT_S = 2.0


def is_reachable(address: str) -> bool:
    """Whether somebody listens there: host:port, of the head node's store or of any node's raylet."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def node_name(node: Mapping[str, Any]) -> str:
    """Name a node of `ray.nodes()`: as `ray start --node-name` has it, else by its host name."""
    name = str(node.get("NodeName") or "")
    unnamed = name in ("", node.get("NodeManagerAddress"))  # Ray puts the address where there is no name
    return str(node.get("NodeManagerHostname", "")) if unnamed else name


def this_node() -> tuple[str, str]:
    """Name and present id of this process's node."""
    import ray  # here, as devices are checked where there is no Ray, too

    node_id = this_node_id()
    return next(node_name(node) for node in ray.nodes() if node["NodeID"] == node_id), node_id


def this_node_id() -> str:
    """Present id of this process's node; it asks nobody."""
    import ray

    return str(ray.get_runtime_context().get_node_id())
