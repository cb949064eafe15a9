"""Ray Train's controller is started again when it dies, and not for ever."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, RaySystemError
from ray.train import WorkerGroupError

from areal_ray.config import load
from areal_ray.controller import snapshot
from areal_ray.controller.trainer import Trainer
from areal_ray.driver import supervisor
from areal_ray.driver.supervisor import choose_fit, supervise
from areal_ray.run import JobContext, RunDir
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit

EXPERIMENT = str(Path(__file__).parents[3] / "conf/experiments/tiny.yaml")


@pytest.fixture
def run(tmp_path):
    return RunDir(LocalStorage(tmp_path))


class Controllers:
    """Controllers that do one after the other what `ends` says: an exception, or a name of a checkpoint before it."""

    def __init__(self, run, *ends):
        self._run, self.todo, self.waited = run, list(ends), []

    def fit(self):
        end = self.todo.pop(0)
        if isinstance(end, tuple):
            name, end = end
            self._run.storage.sub(name).make()
            self._run.storage.sub(name).replace("manifest.json", b"{}")
        if isinstance(end, Exception):
            raise end
        return end

    def supervise(self):
        return supervise(self.fit, self._run, sleep=self.waited.append)


@pytest.fixture
def controllers(run):
    return lambda *ends: Controllers(run, *ends)


@pytest.mark.parametrize("error", [ActorDiedError(), RaySystemError("lost")])
def test_a_controller_that_dies_is_started_again(controllers, run, capsys, error):
    assert controllers(error, {"step": 7}).supervise() == {"step": 7}
    assert len(run.events("controller_died")) == 1
    assert "starting Ray Train again" in capsys.readouterr().out


def test_it_waits_longer_and_longer_and_gives_up(controllers):
    made = controllers(*[ActorDiedError()] * 20)
    with pytest.raises(ActorDiedError):
        made.supervise()
    assert len(made.todo) == 20 - 6
    assert made.waited == [0.0, 1.0, 2.0, 4.0, 8.0]


def test_a_checkpoint_in_between_begins_the_count_anew(controllers):
    ends = [(f"step-{step:08d}.a1", ActorDiedError()) for step in range(1, 11)]
    made = controllers(*ends, {"step": 10})
    assert made.supervise() == {"step": 10}
    assert made.waited == [0.0] * 10


def test_storage_that_is_away_is_waited_for_however_long(controllers):
    made = controllers(*[OSError("no route")] * 20, {"step": 1})
    assert made.supervise() == {"step": 1}
    assert max(made.waited) == 60.0


def test_a_run_that_the_controller_gives_up_is_not_tried_again(controllers):
    made = controllers(WorkerGroupError("failed", {0: ValueError("mine")}), {"step": 1})
    with pytest.raises(WorkerGroupError):
        made.supervise()
    assert len(made.todo) == 1


def test_every_start_has_a_new_list_of_checkpoints(run, monkeypatch):
    rebuilt = []
    monkeypatch.setattr(snapshot, "rebuild", rebuilt.append)
    monkeypatch.setattr(Trainer, "__init__", lambda self, *args, **options: None)
    monkeypatch.setattr(Trainer, "fit", lambda self: SimpleNamespace(return_value={"step": 7}))
    monkeypatch.setattr(supervisor, "requests_to", lambda *_: None)
    fit = choose_fit(load(EXPERIMENT, [f"run.storage_path={run.storage.location}"]), JobContext(run, "it"))
    assert [fit(), fit()] == [{"step": 7}] * 2
    assert rebuilt == [run.storage] * 2
