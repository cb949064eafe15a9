"""Standbys on nodes without workers: a few, once for each node, and whatever goes wrong, training goes on."""

from types import SimpleNamespace

import pytest

from areal_ray.cluster import spare_nodes
from areal_ray.cluster.spare_nodes import SpareNodes

pytestmark = pytest.mark.unit


def node(name, cpus=1, alive=True, gpus=0):
    return {"NodeID": name, "NodeName": name, "Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.fixture
def spare(monkeypatch):
    """Makes one for a job on the node `mine`, in a cluster of `nodes`."""
    context = SimpleNamespace(get_job_id=lambda: "01")
    monkeypatch.setattr(spare_nodes.ray, "get_runtime_context", lambda: context)
    made = SimpleNamespace(nodes=[node("mine")], asked=[], events=[], complaints=[])

    def start(count, node):
        made.asked.append((node["NodeID"], count))

    def note(kind, **fields):
        made.events.append({"event": kind, **fields})

    def of(needed=None, start=start):
        needed = needed or {"CPU": 1}
        return SpareNodes(
            {"mine"}, 2, needed, made.events, note, made.complaints.append, lambda: made.nodes, 0.0, start
        )

    made.of = of
    return made


def test_each_spare_node_is_asked_once_in_the_life_of_a_job(spare):
    first = spare.of()
    first.look()
    assert spare.asked == []
    spare.nodes.append(node("other"))
    first.look()
    first.look()
    assert spare.asked == [("other", 2)]
    spare.nodes.append(node("late"))
    spare.of().look()  # of the next attempt
    assert spare.asked == [("other", 2), ("late", 2)]
    spare.events[:] = [{**event, "job": "02"} for event in spare.events]
    spare.of().look()
    assert len(spare.asked) == 4


def test_nodes_that_are_gone_or_too_small_are_none(spare):
    spare.nodes += [node("gone", alive=False), node("small", cpus=0), node("no gpu", cpus=8)]
    spare.of({"CPU": 1, "GPU": 1}).look()
    assert spare.asked == []


def test_a_cluster_with_many_other_nodes_is_left_alone(spare):
    spare.nodes += [node("a"), node("b"), node("c")]
    spare.of().look()
    assert spare.asked == []


def test_a_raylet_that_refuses_again_and_again_is_said_in_one_line(spare):
    def refuse(count, node):
        spare.asked.append(node["NodeID"])
        raise RuntimeError("not\n implemented")

    spare.nodes.append(node("other"))
    spare.of(start=refuse)._go_on()
    assert spare.complaints == ["no standbys on spare nodes: RuntimeError: not implemented"]
    assert spare.asked == ["other"] * 3
    assert spare.events == []
