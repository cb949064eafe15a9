"""On which nodes what a group had reserved can be kept."""

from contextlib import contextmanager
from types import SimpleNamespace

import grpc
import pytest
from ray.util.placement_group import PlacementGroup

from areal_ray import reservation

pytestmark = pytest.mark.unit

GROUP = "ab" * 18
NOT_DRAINING = -1


class Node:
    """A node, and what its raylet answers."""

    def __init__(self, name, alive=True, draining=NOT_DRAINING, used=(), dead=False):
        self.entry = {"NodeID": name, "Alive": alive}
        self._draining, self._used, self._dead = draining, list(used), dead
        self.asked = 0

    def GetResourceLoad(self, request, timeout):
        self.asked += 1
        if self._dead:
            raise grpc.RpcError
        total = {"CPU": 2.0, f"bundle_group_0_{GROUP}": 1000.0, f"CPU_group_0_{GROUP}": 1.0}
        used = self._used.pop(0) if self._used else 0.0
        free = {**total, "CPU": 0.0, f"CPU_group_0_{GROUP}": 1.0 - used}
        answer = SimpleNamespace(
            draining_deadline_timestamp_ms=self._draining, resources_total=total, resources_available=free
        )
        return SimpleNamespace(resources=answer)


@pytest.fixture
def free(monkeypatch):
    def ask(*nodes, state="CREATED", places=("a", "b")):
        by_name = {node.entry["NodeID"]: node for node in nodes}

        @contextmanager
        def raylet(entry):
            yield by_name[entry["NodeID"]]

        table = {"state": state, "bundles_to_node_id": dict(enumerate(places))}
        monkeypatch.setattr(reservation, "raylet", raylet)
        monkeypatch.setattr(reservation, "placement_group_table", lambda group: table)
        monkeypatch.setattr(reservation.ray, "nodes", lambda: [node.entry for node in nodes])
        return reservation._is_free(PlacementGroup(reservation.PlacementGroupID.from_hex(GROUP)))

    return ask


def test_it_is_free_when_nobody_uses_it_on_any_of_its_nodes(free):
    others = Node("c", alive=False), Node("d", dead=True)
    assert free(Node("a"), Node("b"), *others)
    assert [node.asked for node in others] == [0, 0]


def test_processes_that_are_about_to_be_gone_are_waited_for(free):
    ending = Node("a", used=[1.0, 1.0])
    assert free(ending, Node("b"))
    assert ending.asked == 3


@pytest.mark.parametrize(
    "second",
    [
        {"alive": False},
        {"dead": True},
        {"draining": 0},
        {"draining": 1_800_000_000_000},
        {"used": [1.0] * 1000},
    ],
)
def test_it_is_not_when_a_node_is_gone_or_going_or_in_use(free, second, monkeypatch):
    monkeypatch.setattr(reservation, "_GONE_S", 0.0)
    assert not free(Node("a"), Node("b", **second))


def test_nor_when_the_head_node_has_taken_it_back_or_moves_it(free):
    assert not free(Node("a"), Node("b"), state="REMOVED")
    assert not free(Node("a"), Node("b"), state="RESCHEDULING")


def test_nor_when_the_raylet_knows_nothing_of_it(free, monkeypatch):
    monkeypatch.setattr(reservation, "_GONE_S", 0.0)
    node = Node("a")
    answer = node.GetResourceLoad(None, None)
    answer.resources.resources_total = {"CPU": 2.0}
    node.GetResourceLoad = lambda request, timeout: answer
    assert not free(node, places=("a",))


def test_nor_when_it_cannot_be_asked(free, monkeypatch, capsys):
    def raylet(entry):
        raise RuntimeError("no such call")

    assert free(Node("a"), places=("a",))
    monkeypatch.setattr(reservation, "raylet", raylet)
    assert not reservation._is_free(PlacementGroup(reservation.PlacementGroupID.from_hex(GROUP)))
    assert "could not be asked: RuntimeError: no such call" in capsys.readouterr().out


def test_what_the_head_node_does_not_take_back_now_it_is_given_later(monkeypatch, capsys):
    away, removed = [True], []

    def remove(group):
        if away:
            raise away.pop() and ConnectionError("away")
        removed.append(group)

    monkeypatch.setattr(reservation, "remove_placement_group", remove)
    made = reservation.Reservations()
    made.keep(
        "group", SimpleNamespace(resources_per_worker={}, num_workers=1, placement_strategy="", label_selector=None)
    )
    made.give_back()
    assert "could not give back" in capsys.readouterr().out
    made.give_back()
    made.give_back()
    assert removed == ["group"]
