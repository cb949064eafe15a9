"""Decisions of the controller on the number of workers."""

from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig

from areal_ray.cluster.bad_devices import BadDevice, DeviceName
from areal_ray.cluster.requests import StoppedWhileWaiting
from areal_ray.controller import scaling_policy
from areal_ray.controller.scaling_policy import OtherJobs, ScalingPolicy
from areal_ray.controller.worker_count import room_for
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage

from .controller_fakes import Clock, MemoryRequests, Scaling, worker_count

pytestmark = pytest.mark.unit


@pytest.fixture
def requests():
    return MemoryRequests()


@pytest.fixture
def run(tmp_path):
    return RunDir(LocalStorage(tmp_path))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def count(requests, run, clock):
    return worker_count(requests, run, clock)


@pytest.fixture
def scaling(requests, count):
    return Scaling(requests, count)


@pytest.mark.parametrize(("room", "started"), [(1, 1), (2, 2), (3, 2), (4, 4), (9, 4)])
def test_the_largest_usable_number_that_there_is_room_for_starts(scaling, room, started):
    scaling.room = room
    assert scaling.start() == started


def test_waiting_says_what_there_is_and_what_is_needed_once(scaling, run, capsys):
    assert [scaling.start() for _ in range(3)] == [None, None, None]
    assert capsys.readouterr().out.count("has room for 0 workers of {'CPU': 1}, needed are 1") == 1
    (event,) = run.events("waiting")
    assert (event["room"], event["needed"]) == (0, 1)


def test_to_stop_ends_the_waiting(scaling, requests):
    requests.reason = "stop"
    with pytest.raises(StoppedWhileWaiting):
        scaling.start()


def test_a_head_node_that_is_away_is_waited_for(scaling, requests, capsys):
    requests.away, scaling.room = True, 2
    assert scaling.start() is None
    assert "does not answer" in capsys.readouterr().out
    requests.away = False
    assert scaling.start() == 2


def test_workers_are_asked_to_make_room_for_more_when_it_lasts(scaling, requests):
    scaling.room = 4
    scaling.look(running=2)
    assert requests.asks == []
    scaling.look(running=2)
    scaling.look(running=2)
    assert requests.asks == ["resize"]


@pytest.mark.parametrize(("room", "free"), [(2, 8), (3, 8), (4, 1), (8, 0)])
def test_nothing_is_asked_for_without_room_for_a_larger_number(scaling, requests, room, free):
    scaling.room, scaling.free = room, free
    for _ in range(3):
        scaling.look(running=2)
    assert requests.asks == []


def test_fewer_are_tried_when_so_many_could_not_be_started(scaling, count):
    scaling.room = 4
    assert scaling.start() == 4
    assert count.try_fewer() == 4
    assert [scaling.start(), scaling.start()] == [2, 2]  # a restart for another reason tries no fewer
    assert count.try_fewer() == 2
    assert scaling.start() == 1


def test_workers_are_held_back_for_as_long_as_it_was_said(scaling, count, clock):
    scaling.room = 4
    count.hold_back(30.0)
    assert scaling.start() is None
    clock.now += 29.9
    assert scaling.start() is None
    clock.now += 0.2
    assert scaling.start() == 4


def test_to_stop_is_heard_while_workers_are_held_back(scaling, count, requests):
    scaling.room = 4
    count.hold_back(1e6)
    requests.reason = "stop"
    with pytest.raises(StoppedWhileWaiting):
        scaling.start()


def test_the_full_number_is_tried_again_after_a_while(scaling, count, clock):
    scaling.room = 4
    assert scaling.start() == 4
    count.try_fewer()
    clock.now += 300.0 - 1
    assert scaling.start() == 2
    clock.now += 2
    assert scaling.start() == 4


def test_the_smallest_number_is_tried_again_and_again(scaling, count):
    scaling.room = 1
    assert scaling.start() == 1
    count.try_fewer()
    assert scaling.start() == 1


def test_nodes_that_died_without_a_word_are_not_counted_on(monkeypatch, requests, run):
    def node(name, alive=True):
        place = {"NodeManagerAddress": f"host-{name}", "NodeManagerPort": 7}
        return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 2.0}, **place}

    asked = []

    def is_reachable(address):
        asked.append(address)
        return address != "host-gone:7"

    nodes = [node("here"), node("gone"), node("known to be gone", alive=False), node("leaving"), node("there")]
    monkeypatch.setattr(scaling_policy.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(scaling_policy, "draining_nodes", lambda: {"leaving": 0})
    monkeypatch.setattr(scaling_policy, "is_reachable", is_reachable)
    count = worker_count(requests, run, Clock(), range(1, 10))
    scaling = ScalingPolicy(ScalingConfig(num_workers=(1, 9)), count, count._bad_nodes, requests)
    assert scaling._room() == 6
    assert asked == []
    assert scaling._room(ask=True) == 4
    assert sorted(asked) == ["host-gone:7", "host-here:7", "host-there:7"]


@pytest.mark.parametrize(("room", "times"), [(0, 1), (2, 1), (4, 0), (9, 0)])
def test_an_autoscaler_is_asked_for_machines_that_are_missing(scaling, room, times):
    scaling._other_jobs = SimpleNamespace(ask=False)
    scaling.room = room
    scaling.start()
    assert scaling.machine_requests == times
    scaling.look(running=2)
    assert scaling.machine_requests == times + 1
    scaling.look(running=4)
    assert scaling.machine_requests == times + 1


def test_it_hears_of_a_job_that_lacks_nothing_once_others_ask(scaling):
    scaling._other_jobs = SimpleNamespace(ask=False)
    scaling.look(running=4)
    assert scaling.machine_requests == 0
    scaling._other_jobs.ask = True
    scaling.look(running=4)
    assert scaling.machine_requests == 1


def test_it_is_not_asked_at_every_poll(requests, count):
    scaling = Scaling(requests, count, look_s=1000.0)
    scaling._other_jobs = SimpleNamespace(ask=True)
    for _ in range(3):
        scaling.poll(running=4)
    assert scaling.machine_requests == 1


def test_others_are_looked_for_until_they_ask():
    is_reachable = [ValueError("no such actor"), ConnectionError("the head node is away"), None]
    asked = []

    def get_actor(name, namespace):
        asked.append((name, namespace))
        if answer := is_reachable.pop(0):
            raise answer

    others = OtherJobs(0.0, get_actor)
    others._thread.join(30)
    assert others.ask
    assert asked == [("AutoscalingCoordinator", "AutoscalingCoordinator")] * 3


@pytest.mark.parametrize(("room", "calls"), [(2, ["cancel"]), (4, [])])
def test_ray_s_actor_for_requests_is_not_started_for_nothing(scaling, room, calls):
    done = []
    scaling.after_controller_start(SimpleNamespace(run_id="run"))
    scaling._coordinator_client = SimpleNamespace(cancel_resource_request=lambda: done.append("cancel"))
    scaling.room = room
    scaling.start()
    scaling.before_controller_abort()
    assert done == calls
    assert scaling.machine_requests == len(calls)


@pytest.mark.parametrize(
    ("nodes", "worker", "room"),
    [
        ([{"CPU": 3.0}, {"CPU": 1.0}], {"CPU": 1}, 4),
        ([{"CPU": 3.0}, {"CPU": 1.0}], {"CPU": 2}, 1),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}], {"CPU": 1, "GPU": 1}, 2),
        ([{"CPU": 0.0}], {"CPU": 0}, 9),
        ([{"CPU": 100.0}], {"CPU": 1}, 9),
        ([], {"CPU": 1}, 0),
    ],
)
def test_workers_are_counted_node_by_node(nodes, worker, room):
    assert room_for(nodes, worker, most=9) == room


def fail_twice(count, node):
    for _ in range(2):
        count._bad_nodes.record([BadDevice(DeviceName(node, "id", 0, f"GPU-{node}"), "ECC")])


def test_a_node_that_is_left_out_gives_no_room_and_gets_no_worker(monkeypatch, requests, run):
    nodes = [
        {"NodeID": f"id-{name}", "NodeManagerHostname": name, "Alive": True, "Resources": {"CPU": 2.0}}
        for name in ("good", "bad")
    ]
    monkeypatch.setattr(scaling_policy.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(scaling_policy, "draining_nodes", dict)
    monkeypatch.setattr(scaling_policy, "free_resources", lambda: {"id-good": {"CPU": 1.0}, "id-bad": {"CPU": 2.0}})
    count = worker_count(requests, run, Clock(), range(1, 10))
    scaling = ScalingPolicy(ScalingConfig(num_workers=(1, 9)), count, count._bad_nodes, requests)
    seen = []
    monkeypatch.setattr(scaling, "_maybe_send_resource_request", lambda: seen.append(scaling.scaling_config))
    start = {"scaling_config": scaling.scaling_config, "num_workers": 2}
    assert (scaling._room(), scaling._free(), scaling.on_controller_start_worker_group(**start)) == (4, 3, None)
    fail_twice(count, "bad")
    assert (scaling._room(), scaling._free()) == (2, 1)
    selector = {"ray.io/node-id": "!in(id-bad)"}
    assert scaling.on_controller_start_worker_group(**start) == selector
    scaling._request_machines()
    assert seen[0].label_selector == selector


def test_waiting_says_which_nodes_are_left_out_why_and_how_they_come_back(scaling, count, capsys, monkeypatch):
    monkeypatch.setattr(scaling_policy.ray, "nodes", list)
    fail_twice(count, "host-7")
    capsys.readouterr()
    assert scaling.start() is None
    assert (
        "needed are 1; host-7 is left out (GPU 0 (GPU-host-7): ECC): cluster.use_again='[host-7]' takes it back"
        in capsys.readouterr().out
    )
