"""Questions to a node: whether anybody listens there, and calls to its raylet.

The calls are internal to Ray. Where they are refused, callers do without.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def raylet(node: Mapping[str, Any]) -> Iterator[Any]:
    """The service of a node's raylet (node_manager.proto), as long as the block lasts.

    Args:
        node: as in `ray.nodes()`.
    """
    from ray._common.network_utils import build_address
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    address = build_address(node["NodeManagerAddress"], node["NodeManagerPort"])
    channel = init_grpc_channel(address, options=GLOBAL_GRPC_OPTIONS)
    try:
        yield NodeManagerServiceStub(channel)
    finally:
        channel.close()
