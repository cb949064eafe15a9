"""Nodes of a cluster: their names, whether they can be reached, and through which interface their ranks speak."""

from __future__ import annotations

import ipaddress
import os
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


def use_own_interface() -> str:
    """Have gloo and NCCL speak through the interface with this node's Ray address, unless their variables are given.

    Gloo else listens at what the host name resolves to, which Debian's /etc/hosts makes 127.0.1.1: no other node gets
    there. An address that no interface has (behind NAT) changes nothing.

    Returns:
        Node, address and interface, as a message names them.
    """
    import ray

    address = ray.util.get_node_ip_address()
    interface = interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if not ipaddress.ip_address(address).is_loopback:  # which NCCL takes by itself where there is nothing else
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # exactly: it takes names for beginnings
    used = os.environ.get("GLOO_SOCKET_IFNAME", "the one of its host name")
    return f"{socket.gethostname()} at {address} (interface {used})"


def interface_of(address: str) -> str | None:
    """Name of this machine's network interface with an IP address; None if none has it."""
    import psutil

    wanted = ipaddress.ip_address(address)
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            ip = each.family in (socket.AF_INET, socket.AF_INET6)
            if ip and ipaddress.ip_address(each.address.partition("%")[0]) == wanted:
                return str(name)
    return None
