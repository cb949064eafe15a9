"""The interface that ranks speak through is the one with their node's Ray address."""

import socket
from types import SimpleNamespace

import psutil
import pytest
import ray

from areal_ray.cluster import nodes

pytestmark = pytest.mark.unit

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture
def environment(monkeypatch):
    """Starts a rank on a node with such an address, and such variables; the variables it leaves."""

    def address(ip, family=socket.AF_INET):
        return SimpleNamespace(family=family, address=ip)

    interfaces = {
        "lo": [address("127.0.0.1"), address("::1", socket.AF_INET6)],
        "eth0": [address("192.168.0.2"), address("02:42:ac:11:00:02", psutil.AF_LINK)],
        "eth1": [address("10.0.0.2"), address("fe80::2%eth1", socket.AF_INET6), address("fd00::2", socket.AF_INET6)],
    }
    environ = {}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
    monkeypatch.setattr(nodes, "os", SimpleNamespace(environ=environ))
    monkeypatch.setattr(socket, "gethostname", lambda: "node6")

    def start(ip, **given):
        environ.clear()
        environ.update(given)
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: ip)
        return nodes.use_own_interface(), environ

    return start


@pytest.mark.parametrize("ip", ["10.0.0.2", "fd00:0::2"])
def test_gloo_and_nccl_speak_where_the_node_s_ray_address_is(environment, ip):
    said, variables = environment(ip)
    assert variables == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}
    assert said == f"node6 at {ip} (interface eth1)"


def test_what_is_given_stays(environment):
    given = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib"}
    said, variables = environment("10.0.0.2", **given)
    assert variables == given
    assert said == "node6 at 10.0.0.2 (interface ib0)"


def test_on_one_machine_nccl_is_left_to_itself(environment):
    assert environment("127.0.0.1")[1] == {"GLOO_SOCKET_IFNAME": "lo"}


def test_an_address_that_no_interface_has_changes_nothing(environment):
    said, variables = environment("203.0.113.7")
    assert variables == {}
    assert "the one of its host name" in said
