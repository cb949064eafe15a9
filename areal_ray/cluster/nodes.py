"""Reachability of the nodes of a cluster."""

from __future__ import annotations

import socket

_CONNECT_S = 2.0


def is_reachable(address: str) -> bool:
    """Whether somebody listens there: host:port, of the head node's store or of any node's raylet."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True
