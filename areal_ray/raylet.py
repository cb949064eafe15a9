"""Questions to a node's raylet itself: calls that are internal to Ray. Where they are refused, callers do without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray._common.network_utils import build_address
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub


@contextmanager
def raylet(node: Mapping[str, Any]) -> Iterator[Any]:
    """The service of a node's raylet (node_manager.proto), as long as the block lasts.

    Args:
        node: as in `ray.nodes()`.
    """
    address = build_address(node["NodeManagerAddress"], node["NodeManagerPort"])
    channel = init_grpc_channel(address, options=GLOBAL_GRPC_OPTIONS)
    try:
        yield NodeManagerServiceStub(channel)
    finally:
        channel.close()
