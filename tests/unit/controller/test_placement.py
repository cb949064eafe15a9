"""Nodes on which a placement group can be kept."""

from contextlib import contextmanager
from types import SimpleNamespace

import grpc
import pytest
from ray.util.placement_group import PlacementGroup

from areal_ray.cluster.ray_internals import placement_group_id
from areal_ray.controller import placement

pytestmark = pytest.mark.unit

GROUP = "ab" * 18
WANTED = SimpleNamespace(resources_per_worker={"CPU": 1}, num_workers=1, placement_strategy="PACK", label_selector=None)


class Refusal(grpc.RpcError):
    def __init__(self, code):
        self._code = code

    def code(self):
        return self._code

    def __str__(self):
        return str(self._code)


class Node:
    """A node, and what its raylet answers."""

    def __init__(self, name, alive=True, draining=False, used=(), refuses=None):
        self.entry = {"NodeID": name, "Alive": alive}
        self._draining, self._used, self._refuses = draining, list(used), refuses
        self.asked = 0

    def GetResourceLoad(self, request, timeout):
        self.asked += 1
        if self._refuses:
            raise Refusal(self._refuses)
        total = {"CPU": 2.0, f"bundle_group_0_{GROUP}": 1000.0, f"CPU_group_0_{GROUP}": 1.0}
        used = self._used.pop(0) if self._used else 0.0
        free = {**total, "CPU": 0.0, f"CPU_group_0_{GROUP}": 1.0 - used}
        answer = SimpleNamespace(is_draining=self._draining, resources_total=total, resources_available=free)
        return SimpleNamespace(resources=answer)


@pytest.fixture
def free(monkeypatch):
    def ask(*nodes, state="CREATED", places=("a", "b"), ending_s=1.0):
        by_name = {node.entry["NodeID"]: node for node in nodes}

        @contextmanager
        def node_service(entry):
            yield by_name[entry["NodeID"]]

        table = {"state": state, "bundles_to_node_id": dict(enumerate(places))}
        monkeypatch.setattr(placement, "node_service", node_service)
        monkeypatch.setattr(placement, "placement_group_table", lambda group: table)
        monkeypatch.setattr(placement.ray, "nodes", lambda: [node.entry for node in nodes])
        return placement._is_free(PlacementGroup(placement_group_id(GROUP)), ending_s)

    return ask


def test_it_is_free_when_nobody_uses_it_on_any_of_its_nodes(free):
    others = Node("c", alive=False), Node("d", refuses=grpc.StatusCode.UNAVAILABLE)
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
        {"refuses": grpc.StatusCode.UNAVAILABLE},
        {"refuses": grpc.StatusCode.DEADLINE_EXCEEDED},
        {"draining": True},
        {"used": [1.0] * 1000},
    ],
)
def test_it_is_not_when_a_node_is_gone_or_going_or_in_use(free, second, capsys):
    assert not free(Node("a"), Node("b", **second), ending_s=0.0)
    assert capsys.readouterr().out == ""


def test_nor_when_the_head_node_has_taken_it_back_or_moves_it(free):
    assert not free(Node("a"), Node("b"), state="REMOVED")
    assert not free(Node("a"), Node("b"), state="RESCHEDULING")


def test_nor_when_the_raylet_knows_nothing_of_it(free):
    node = Node("a")
    answer = node.GetResourceLoad(None, None)
    answer.resources.resources_total = {"CPU": 2.0}
    node.GetResourceLoad = lambda request, timeout: answer
    assert not free(node, places=("a",), ending_s=0.0)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAUTHENTICATED])
def test_nor_when_it_cannot_be_asked_which_is_said(free, code, capsys):
    assert not free(Node("a"), Node("b", refuses=code))
    assert f"reserving anew, as the nodes could not be asked: Refusal: {code}" in capsys.readouterr().out


@pytest.fixture
def kept(monkeypatch):
    """A PlacementGroupCache that keeps something, and a head node that is away once."""
    away = [ConnectionError("away")]
    removed = []

    def remove(group):
        if away:
            raise away.pop()
        removed.append(group)

    monkeypatch.setattr(placement, "remove_placement_group", remove)
    made = placement.PlacementGroupCache()
    made.retain("group", WANTED)
    return made, removed


def test_what_the_head_node_does_not_take_back_now_is_given_back_later(kept, capsys):
    cache, removed = kept
    cache.release()
    assert "could not give back the placement group of the workers: away" in capsys.readouterr().out
    cache.release()
    cache.release()
    assert removed == ["group"]


def test_nothing_is_reserved_beside_what_could_not_be_given_back(kept, monkeypatch):
    cache, removed = kept
    made = []
    monkeypatch.setattr(placement, "placement_group", lambda **options: made.append(options) or "new")
    more = SimpleNamespace(**{**vars(WANTED), "num_workers": 2})
    with pytest.raises(ConnectionError):
        cache.acquire(SimpleNamespace(run_id="r"), more)
    assert made == []
    assert cache.acquire(SimpleNamespace(run_id="r"), more) == "new"
    assert (removed, [each["bundles"] for each in made]) == (["group"], [[{"CPU": 1}] * 2])


def test_a_group_on_nodes_that_are_left_out_since_is_not_used_again(kept, monkeypatch):
    cache, removed = kept
    cache.release()
    made = []
    monkeypatch.setattr(placement, "placement_group", lambda **options: made.append(options) or "new")
    labels = [{"ray.io/node-id": "!in(ab)"}]
    assert cache.acquire(SimpleNamespace(run_id="r"), SimpleNamespace(**{**vars(WANTED), "label_selector": labels}))
    assert removed == ["group"]
    assert made[0]["bundle_label_selector"] == labels
