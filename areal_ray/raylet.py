"""Questions to a node's raylet itself. The calls are internal to Ray; where they are refused the callers do without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

CALL_S = 10.0  # time limit of a call


@contextmanager
def raylet(node: Mapping[str, Any]) -> Iterator[Any]:
    """The service of a node's raylet (node_manager.proto), as long as the block lasts.

    Args:
        node: as in `ray.nodes()`.
    """
    # With these comes Ray, which must not be imported before the job's token is set, see cluster.py.
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    try:
        yield NodeManagerServiceStub(channel)
    finally:
        channel.close()
