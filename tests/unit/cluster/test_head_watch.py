"""The head node, watched from the driver and from the workers."""

import socket
import threading

import pytest

from areal_ray.cluster.head_watch import watching
from areal_ray.driver.connect import answering

pytestmark = pytest.mark.unit

LIMIT_S = 30  # for what must come; far less is needed


def quickly(address, say, lost, lost_after_s=LIMIT_S):
    return watching(address, say, lost, look_s=0.01, say_after_s=0.05, lost_after_s=lost_after_s)


class Said:
    """Lines, and waiting for them."""

    def __init__(self):
        self.lines, self._new = [], threading.Condition()

    def __call__(self, line):
        with self._new:
            self.lines.append(line)
            self._new.notify_all()

    def wait_for(self, count):
        with self._new:
            assert self._new.wait_for(lambda: len(self.lines) >= count, LIMIT_S)


def listen(port=0):
    server = socket.create_server(("127.0.0.1", port))
    return server, f"127.0.0.1:{server.getsockname()[1]}"


def never():
    raise AssertionError("was given up")


def test_a_head_node_that_is_away_for_a_while_is_said_to_be_away_and_back():
    server, address = listen()
    said = Said()
    with quickly(address, said, never):
        server.close()
        said.wait_for(1)
        again, _ = listen(int(address.rpartition(":")[2]))
        said.wait_for(2)
        again.close()
    assert "does not answer" in said.lines[0]
    assert address in said.lines[0]
    assert "answers again" in said.lines[1]


def test_a_head_node_that_stays_away_is_given_up_once():
    server, address = listen()
    server.close()
    lost, count = threading.Event(), []

    def give_up():
        count.append(1)
        lost.set()

    with quickly(address, lambda _: None, give_up, lost_after_s=0.1):
        assert lost.wait(LIMIT_S)
    assert count == [1]


@pytest.mark.parametrize(
    ("answers", "is_lost"), [(["a", None, "b"], True), (["a", None, "a"], False), ([None], False)]
)  # None: it does not say
def test_another_cluster_at_the_same_address_is_not_the_one_that_went(answers, is_lost):
    server, address = listen()
    said, lost, left = Said(), threading.Event(), iter(answers)
    limits = {"look_s": 0.01, "say_after_s": 0.05, "lost_after_s": LIMIT_S}
    with watching(address, said, lost.set, identity=lambda: next(left), **limits):
        server.close()
        said.wait_for(1)
        again, _ = listen(int(address.rpartition(":")[2]))
        if is_lost:
            assert lost.wait(LIMIT_S)
        else:
            said.wait_for(2)
        again.close()
    assert lost.is_set() == is_lost
    assert len(said.lines) == (1 if is_lost else 2)


def test_of_one_that_answers_nothing_is_said():
    server, address = listen()
    said = Said()
    with quickly(address, said, never):
        server.settimeout(LIMIT_S)
        for _ in range(3):  # looks
            server.accept()[0].close()
    server.close()
    assert said.lines == []


@pytest.mark.parametrize("address", ["", "auto", "local", "ray://127.0.0.1:{port}", "127.0.0.1:{other}"])
def test_only_a_cluster_that_answers_is_joined_early(monkeypatch, address):
    server, there = listen()
    gone, elsewhere = listen()
    gone.close()
    monkeypatch.setenv("RAY_ADDRESS", there)
    assert answering()
    ports = {"port": there.rpartition(":")[2], "other": elsewhere.rpartition(":")[2]}
    monkeypatch.setenv("RAY_ADDRESS", address.format(**ports))
    assert not answering()
    server.close()
