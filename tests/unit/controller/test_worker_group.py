"""The group of workers as the controller starts and ends it."""

import threading
from types import SimpleNamespace

import pytest
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from areal_ray.cluster import waiting
from areal_ray.controller import placement, worker_group
from areal_ray.controller.worker_group import GroupLife, Groups
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit

LIMIT_S = 30


@pytest.fixture
def killed(monkeypatch):
    ended = []
    monkeypatch.setattr(worker_group.ray, "kill", ended.append)
    return ended


def worker(name):
    return SimpleNamespace(actor=name)


@pytest.fixture
def run(tmp_path):
    return RunDir(LocalStorage(tmp_path))


def life(run, limit_s, **options):
    made = GroupLife(run, limit_s, None, **options)
    made.after_controller_start(SimpleNamespace(run_id="r"))
    return made


def test_a_start_that_hangs_is_ended_and_gives_back_what_it_holds(run, killed, monkeypatch, capsys):
    released = threading.Event()
    monkeypatch.setattr(worker_group, "release_all", lambda context: released.set() if context.run_id == "r" else None)
    hanging = life(run, 0.05)
    with hanging.on_worker_group_start():
        hanging.before_init_train_context([worker("a"), worker("b")])
        assert released.wait(LIMIT_S)
    assert killed == ["a", "b"]
    assert "have not started" in capsys.readouterr().out


def test_a_start_that_fails_does_not_end_the_group_that_comes_next(run, killed, monkeypatch):
    monkeypatch.setattr(worker_group, "release_all", lambda _: killed.append("all"))
    timers = []

    class Timer(threading.Timer):
        def __init__(self, *args):
            super().__init__(*args)
            timers.append(self)

    failing = life(run, 3600, timer=Timer)
    with pytest.raises(RuntimeError, match="no room"), failing.on_worker_group_start():
        raise RuntimeError("no room")
    with failing.on_worker_group_start():
        failing.before_init_train_context([worker("a")])
    assert len(timers) == 2
    for timer in timers:
        timer.join(LIMIT_S)
        assert timer.finished.is_set()
    assert killed == []


def test_the_phases_of_a_start_stand_in_the_ledger(run, killed):
    now = [100.0]
    timed = life(run, 3600, clock=lambda: now[0])

    def start(seconds):
        with timed.on_worker_group_start():
            timed.before_worker_group_start(None)
            reached = {"placed": now[0] + 0.5, "ready": now[0] + seconds}
            timed.before_init_train_context([worker("a")])
            now[0] += seconds + 1.0
            timed.after_worker_group_start(SimpleNamespace(reached=reached))
            now[0] += 0.125
            timed.after_worker_group_training_start(None)

    start(4.0)
    timed.before_controller_execute_failure_decision(None)
    now[0] += 2.0  # for room
    timed.before_worker_group_shutdown(SimpleNamespace(get_workers=lambda: [worker("a")]))
    now[0] += 0.25
    timed.after_worker_group_shutdown(None)
    start(1.0)
    phases = [{k: v for k, v in event.items() if k.endswith("_s")} for event in run.events("group")]
    assert phases == [
        {"start_s": 0.5, "imports_s": 3.5, "process_group_s": 1.0, "launch_s": 0.125},
        {
            "start_s": 0.5,
            "imports_s": 0.5,
            "process_group_s": 1.0,
            "launch_s": 0.125,
            "teardown_s": 0.25,
            "wait_s": 2.0,
        },
    ]
    assert killed == ["a"]


class Kept:
    """In the place of PlacementGroupCache."""

    def __init__(self):
        self.kept, self.removed, self.given_back = [], [], 0

    def acquire(self, context, wanted):
        return f"reserved for {wanted}"

    def retain(self, reserved, wanted):
        self.kept.append((reserved, wanted))

    def release(self):
        self.given_back += 1


@pytest.fixture
def cache(monkeypatch):
    made = Kept()
    monkeypatch.setattr(
        "ray.train.v2._internal.execution.worker_group.placement_group_handle.remove_placement_group",
        made.removed.append,
    )
    return made


@pytest.fixture
def started(cache, monkeypatch):
    """Makes a group that has got its room; `fails`: what its start ends with."""

    def init(self, worker_group_context):
        self._worker_group_context, self._train_run_context = worker_group_context, None
        self._worker_group_state, self._world_rank_to_ongoing_poll, self._callbacks = None, {}, []

    def make(half_up=True, fails=None):
        def start(self):
            if half_up:
                handle = self._create_placement_group(None, self._worker_group_context)
                self._worker_group_state = SimpleNamespace(
                    placement_group_handle=handle, shutdown=handle.shutdown, workers=[member("n1", 7), member("n2", 8)]
                )
            if fails:
                raise fails

        monkeypatch.setattr(WorkerGroup, "__init__", init)
        monkeypatch.setattr(WorkerGroup, "_start", start)
        return groups.create(worker_group_context="two")

    groups = Groups(cache)
    return make


def member(node, pid):
    return SimpleNamespace(metadata=SimpleNamespace(node_id=node, pid=pid))


def test_a_group_knows_the_processes_of_the_one_before(started):
    first = started()
    assert first.ending == {}
    first.shutdown()
    assert started().ending == {"n1": [7], "n2": [8]}


def test_what_a_group_had_that_is_aborted_is_given_back(started, cache):
    started().abort()
    assert (cache.kept, cache.removed) == ([], ["reserved for two"])
    assert cache.given_back == 1  # what a group before it may have left


@pytest.mark.parametrize("half_up", [True, False])
def test_a_group_that_was_half_up_gives_back_what_it_had_reserved(started, cache, half_up):
    with pytest.raises(RuntimeError, match="a worker died"):
        started(half_up, RuntimeError("a worker died"))
    assert cache.removed == (["reserved for two"] if half_up else [])
    assert cache.kept == []


def test_what_a_group_had_is_kept_when_what_follows_its_end_fails(started, cache, monkeypatch):
    def shutdown(self):
        self._worker_group_state.shutdown()
        raise RuntimeError("a callback failed")

    made = started()
    monkeypatch.setattr(WorkerGroup, "shutdown", shutdown)
    with pytest.raises(RuntimeError, match="a callback failed"):
        made.shutdown()
    assert (cache.kept, cache.removed) == ([("reserved for two", "two")], [])


def test_when_there_was_room_is_noted(cache, monkeypatch):
    monkeypatch.setattr(worker_group.time, "time", lambda: 7.0)
    monkeypatch.setattr(worker_group.DefaultPlacementGroupHandle, "wait", lambda self, seconds: True)
    reached = {}
    assert worker_group._Handle(None, reached).wait(1)
    assert reached == {"placed": 7.0}


def test_only_what_this_controller_reserved_is_given_back(monkeypatch):
    identity = "0" * 36
    entries = {
        identity: {"name": "areal_ray-mine-1", "state": "CREATED"},
        "1" * 36: {"name": "areal_ray-mine-2", "state": "REMOVED"},
        "2" * 36: {"name": "areal_ray-another-1", "state": "CREATED"},
        "3" * 36: {"name": "", "state": "CREATED"},
    }
    removed = []
    monkeypatch.setattr(placement, "placement_group_table", lambda: entries)
    monkeypatch.setattr(placement, "remove_placement_group", lambda each: removed.append(each.id.hex()))
    placement.release_all(SimpleNamespace(run_id="mine"))
    assert removed == [identity]


def test_a_group_that_waits_says_what_for_and_again_when_that_changes(monkeypatch, capsys):
    answers, texts = iter([False, False, False, True]), iter(["none free", "none free", "one free"])
    monkeypatch.setattr(worker_group.DefaultPlacementGroupHandle, "wait", lambda self, seconds: next(answers))
    assert worker_group._Handle(None, {}, lambda: next(texts)).wait(60)
    assert [line.removeprefix("[areal_ray] ") for line in capsys.readouterr().out.splitlines()] == [
        "none free",
        "one free",
    ]


def test_a_busy_cluster_is_described_with_those_who_hold_it():
    tune = {"bundles": {0: {"CPU": 1.0}, 1: {"CPU": 2.0}}}
    text = waiting.describe(2, {"CPU": 2, "GPU": 0}, [{"CPU": 4.0}, {"CPU": 4.0}], [{"CPU": 3.0}, {}], {"tune": tune})
    assert text == (
        "waiting for room: needed are 2 workers of {'CPU': 2}; "
        "3 of 8 CPU free (placement group tune holds 3, actors and tasks hold 2) on 2 nodes"
    )
