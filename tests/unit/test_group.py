"""The group of workers as the controller starts and ends it."""

import threading
from types import SimpleNamespace

import pytest
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from areal_ray import group
from areal_ray.group import GroupLife, NamedGroup
from areal_ray.rundir import RunDir
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit

LIMIT_S = 30


@pytest.fixture
def killed(monkeypatch):
    ended = []
    monkeypatch.setattr(group.ray, "kill", ended.append)
    return ended


def worker(name):
    return SimpleNamespace(actor=name)


@pytest.fixture
def run(tmp_path):
    return RunDir(LocalStorage(tmp_path))


def life(run, limit_s):
    made = GroupLife(run.storage.recipe, limit_s, None)
    made.after_controller_start(SimpleNamespace(run_id="r"))
    return made


def test_a_start_that_hangs_is_ended_and_gives_back_what_it_holds(run, killed, monkeypatch, capsys):
    released = threading.Event()
    monkeypatch.setattr(group, "release", lambda context: released.set() if context.run_id == "r" else None)
    hanging = life(run, 0.05)
    with hanging.on_worker_group_start():
        hanging.before_init_train_context([worker("a"), worker("b")])
        assert released.wait(LIMIT_S)
    assert killed == ["a", "b"]
    assert "have not started" in capsys.readouterr().out


def test_a_start_that_fails_does_not_end_the_group_that_comes_next(run, killed, monkeypatch):
    monkeypatch.setattr(group, "release", lambda _: killed.append("all"))
    timers = []

    class Timer(threading.Timer):
        def __init__(self, *args):
            super().__init__(*args)
            timers.append(self)

    monkeypatch.setattr(group.threading, "Timer", Timer)
    failing = life(run, 3600)
    with pytest.raises(RuntimeError, match="no room"), failing.on_worker_group_start():
        raise RuntimeError("no room")
    with failing.on_worker_group_start():
        failing.before_init_train_context([worker("a")])
    assert len(timers) == 2
    for timer in timers:
        timer.join(LIMIT_S)
        assert timer.finished.is_set()
    assert killed == []


def test_the_phases_of_a_start_stand_in_the_ledger(run, killed, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(group.time, "time", lambda: now[0])
    timed = life(run, 3600)

    def start(seconds):
        with timed.on_worker_group_start():
            timed.before_worker_group_start(None)
            reached = {"placed": now[0] + 0.5, "ready": now[0] + seconds}
            timed.before_init_train_context([worker("a")])
            now[0] += seconds + 1.0
            timed.after_worker_group_start(SimpleNamespace(reached=reached))
            timed.after_worker_group_training_start(None)

    start(4.0)
    timed.before_worker_group_shutdown(SimpleNamespace(get_workers=lambda: [worker("a")]))
    now[0] += 0.25
    timed.after_worker_group_shutdown(None)
    start(1.0)
    phases = [{k: v for k, v in event.items() if k.endswith("_s")} for event in run.events("group")]
    assert phases == [
        {"start_s": 0.5, "imports_s": 3.5, "process_group_s": 1.0},
        {"start_s": 0.5, "imports_s": 0.5, "process_group_s": 1.0, "teardown_s": 0.25},
    ]
    assert killed == ["a"]


@pytest.mark.parametrize("half_up", [True, False])
def test_a_group_that_was_half_up_gives_back_what_it_had_reserved(monkeypatch, half_up):
    ended = []

    def start(self):
        if half_up:
            self._worker_group_state = SimpleNamespace(shutdown=lambda: ended.append("state"))
        raise RuntimeError("a worker died")

    monkeypatch.setattr(WorkerGroup, "_start", start)
    made = NamedGroup.__new__(NamedGroup)
    made._worker_group_state, made._world_rank_to_ongoing_poll = None, {}
    with pytest.raises(RuntimeError, match="a worker died"):
        made._start()
    assert ended == (["state"] if half_up else [])
    assert not made.has_started()


def test_only_what_this_controller_reserved_is_given_back(monkeypatch):
    identity = "0" * 36
    entries = {
        identity: {"name": "areal_ray-mine-1", "state": "CREATED"},
        "1" * 36: {"name": "areal_ray-mine-2", "state": "REMOVED"},
        "2" * 36: {"name": "areal_ray-another-1", "state": "CREATED"},
        "3" * 36: {"name": "", "state": "CREATED"},
    }
    removed = []
    monkeypatch.setattr(group, "placement_group_table", lambda: entries)
    monkeypatch.setattr(group, "remove_placement_group", lambda each: removed.append(each.id.hex()))
    group.release(SimpleNamespace(run_id="mine"))
    assert removed == [identity]
