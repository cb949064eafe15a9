"""Ray Train's controller is started again when it dies, and not for ever."""

from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, RaySystemError
from ray.train import WorkerGroupError

from areal_ray.driver import supervisor
from areal_ray.driver.supervisor import supervise
from areal_ray.run import JobContext, RunDir
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path):
    return RunDir(LocalStorage(tmp_path))


@pytest.fixture
def controller(monkeypatch, run):
    """What the controllers do, one after the other: an exception, or the name of a checkpoint that they leave first."""
    waited, rebuilt = [], []

    def fits(*ends):
        todo = list(ends)

        def fit():
            end = todo.pop(0)
            if isinstance(end, tuple):
                name, end = end
                run.storage.sub(name).make()
                run.storage.sub(name).replace("manifest.json", b"{}")
            if isinstance(end, Exception):
                raise end
            return SimpleNamespace(return_value=end)

        monkeypatch.setattr(supervisor, "_trainer", lambda *_: SimpleNamespace(fit=fit))
        monkeypatch.setattr(supervisor.snapshot, "rebuild", rebuilt.append)
        monkeypatch.setattr(supervisor.time, "sleep", waited.append)
        return SimpleNamespace(todo=todo, waited=waited, rebuilt=rebuilt)

    return fits


@pytest.mark.parametrize("error", [ActorDiedError(), RaySystemError("lost")])
def test_a_controller_that_dies_is_started_again_with_a_new_list_of_checkpoints(controller, run, capsys, error):
    made = controller(error, {"step": 7})
    assert supervise(None, JobContext(run, "it")) == {"step": 7}
    assert len(made.rebuilt) == 2
    assert len(run.events("controller_died")) == 1
    assert "starting Ray Train again" in capsys.readouterr().out


def test_it_waits_longer_and_longer_and_gives_up(controller, run):
    made = controller(*[ActorDiedError()] * 20)
    with pytest.raises(ActorDiedError):
        supervise(None, JobContext(run, "it"))
    assert len(made.todo) == 20 - supervisor._TROUBLES
    assert made.waited == [0.0, 1.0, 2.0, 4.0, 8.0]


def test_a_checkpoint_in_between_begins_the_count_anew(controller, run):
    ends = [(f"step-{step:08d}.a1", ActorDiedError()) for step in range(1, 11)]
    made = controller(*ends, {"step": 10})
    assert supervise(None, JobContext(run, "it")) == {"step": 10}
    assert made.waited == [0.0] * 10


def test_storage_that_is_away_is_waited_for_however_long(controller, run, monkeypatch):
    made = controller({"step": 1})
    is_reachable = [OSError("no route")] * 20 + [None]

    def rebuild(_):
        if answer := is_reachable.pop(0):
            raise answer

    monkeypatch.setattr(supervisor.snapshot, "rebuild", rebuild)
    assert supervise(None, JobContext(run, "it")) == {"step": 1}
    assert max(made.waited) == 60.0


def test_what_the_controller_gives_up_is_not_tried_again(controller, run):
    made = controller(WorkerGroupError("failed", {0: ValueError("mine")}), {"step": 1})
    with pytest.raises(WorkerGroupError):
        supervise(None, JobContext(run, "it"))
    assert len(made.todo) == 1
