"""What the controller decides: how many workers there are."""

from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig

from areal_ray.controller import scaling_policy
from areal_ray.controller.scaling_policy import ScalingPolicy, StoppedWhileWaiting
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage

from .controller_fakes import Control, Count

pytestmark = pytest.mark.unit


@pytest.fixture
def control():
    return Control()


@pytest.fixture
def run(tmp_path):
    return RunDir(LocalStorage(tmp_path))


@pytest.fixture
def count(control, run, monkeypatch):
    monkeypatch.setattr(scaling_policy, "_PAUSE_S", 0.0)
    monkeypatch.setattr(scaling_policy, "_LOOK_S", 0.0)
    return Count(control, run)


@pytest.mark.parametrize(("room", "started"), [(1, 1), (2, 2), (3, 2), (4, 4), (9, 4)])
def test_the_largest_usable_number_that_there_is_room_for_starts(count, room, started):
    count.room = room
    assert count.start() == started


def test_waiting_says_what_there_is_and_what_is_needed_once(count, run, capsys):
    assert [count.start() for _ in range(3)] == [None, None, None]
    assert capsys.readouterr().out.count("has room for 0 workers of {'CPU': 1}, needed are 1") == 1
    (event,) = run.events("waiting")
    assert (event["room"], event["needed"]) == (0, 1)


def test_to_stop_ends_the_waiting(count, control):
    control.reason = "stop"
    with pytest.raises(StoppedWhileWaiting):
        count.start()


def test_a_head_node_that_is_away_is_waited_for(count, control, capsys):
    control.away, count.room = True, 2
    assert count.start() is None
    assert "does not answer" in capsys.readouterr().out
    control.away = False
    assert count.start() == 2


def test_workers_are_asked_to_make_room_for_more_when_it_lasts(count, control):
    count.room = 4
    count.look(running=2)
    assert control.asks == []
    count.look(running=2)
    count.look(running=2)
    assert control.asks == ["resize"]


@pytest.mark.parametrize(("room", "free"), [(2, 8), (3, 8), (4, 1), (8, 0)])
def test_nothing_is_asked_for_without_room_for_a_larger_number(count, control, room, free):
    count.room, count.free = room, free
    for _ in range(3):
        count.look(running=2)
    assert control.asks == []


def test_fewer_are_tried_when_so_many_could_not_be_started(count):
    count.room = 4
    assert count.start() == 4
    assert count.not_placed() == 4
    assert [count.start(), count.start()] == [2, 2]  # a restart for another reason tries no fewer
    assert count.not_placed() == 2
    assert count.start() == 1


def test_workers_are_held_back_for_as_long_as_it_was_said(count, monkeypatch):
    count.room, now = 4, [1000.0]
    monkeypatch.setattr(scaling_policy, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None))
    count.hold(30.0)
    assert count.start() is None
    now[0] += 29.9
    assert count.start() is None
    now[0] += 0.2
    assert count.start() == 4


def test_to_stop_is_heard_while_workers_are_held_back(count, control):
    count.room = 4
    count.hold(1e6)
    control.reason = "stop"
    with pytest.raises(StoppedWhileWaiting):
        count.start()


def test_the_full_number_is_tried_again_after_a_while(count, monkeypatch):
    count.room, now = 4, [1000.0]
    monkeypatch.setattr(scaling_policy, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None))
    assert count.start() == 4
    count.not_placed()
    now[0] += scaling_policy._REFUSED_S - 1
    assert count.start() == 2
    now[0] += 2
    assert count.start() == 4


def test_the_smallest_number_is_tried_again_and_again(count):
    count.room = 1
    assert count.start() == 1
    count.not_placed()
    assert count.start() == 1


def test_nodes_that_died_without_a_word_are_not_counted_on(monkeypatch, control, run):
    def node(name, alive=True):
        place = {"NodeManagerAddress": f"host-{name}", "NodeManagerPort": 7}
        return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 2.0}, **place}

    asked = []

    def is_reachable(address):
        asked.append(address)
        return address != "host-gone:7"

    nodes = [node("here"), node("gone"), node("known to be gone", alive=False), node("leaving"), node("there")]
    monkeypatch.setattr(scaling_policy.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(scaling_policy.ray._private.state.state, "get_draining_nodes", lambda: {"leaving": 0})
    monkeypatch.setattr(scaling_policy, "is_reachable", is_reachable)
    count = ScalingPolicy(ScalingConfig(num_workers=(1, 9)), range(1, 10), control, run)
    assert count._room() == 6
    assert asked == []
    assert count._room(ask=True) == 4
    assert sorted(asked) == ["host-gone:7", "host-here:7", "host-there:7"]


@pytest.mark.parametrize(("room", "requests"), [(0, 1), (2, 1), (4, 0), (9, 0)])
def test_an_autoscaler_is_asked_for_machines_that_are_missing(count, room, requests):
    count._others = SimpleNamespace(ask=False)
    count.room = room
    count.start()
    assert count.requests == requests
    count.look(running=2)
    assert count.requests == requests + 1
    count.look(running=4)
    assert count.requests == requests + 1


def test_it_hears_of_a_job_that_lacks_nothing_once_others_ask(count):
    count._others = SimpleNamespace(ask=False)
    count.look(running=4)
    assert count.requests == 0
    count._others.ask = True
    count.look(running=4)
    assert count.requests == 1


def test_it_is_not_asked_at_every_poll(count, monkeypatch):
    monkeypatch.setattr(scaling_policy, "_LOOK_S", 1000.0)
    count._others = SimpleNamespace(ask=True)
    for _ in range(3):
        count.poll(running=4)
    assert count.requests == 1


def test_others_are_looked_for_until_they_ask(monkeypatch):
    is_reachable = [ValueError("no such actor"), ConnectionError("the head node is away"), None]
    asked = []

    def get_actor(name, namespace):
        asked.append((name, namespace))
        if answer := is_reachable.pop(0):
            raise answer

    monkeypatch.setattr(scaling_policy, "_OTHERS_S", 0.0)
    monkeypatch.setattr(scaling_policy.ray, "get_actor", get_actor)
    others = scaling_policy._Others()
    others._thread.join(30)
    assert others.ask
    assert asked == [("AutoscalingCoordinator", "AutoscalingCoordinator")] * 3


@pytest.mark.parametrize(("room", "calls"), [(2, ["cancel"]), (4, [])])
def test_ray_s_actor_for_requests_is_not_started_for_nothing(count, room, calls):
    done = []
    count.after_controller_start(SimpleNamespace(run_id="run"))
    count._coordinator_client = SimpleNamespace(cancel_resource_request=lambda: done.append("cancel"))
    count.room = room
    count.start()
    count.before_controller_abort()
    assert done == calls
    assert count.requests == len(calls)
