"""Sweeps: their file, and trials that are runs."""

import json
import sys

import pytest

from areal_ray.cli.main import main as run_cli
from areal_ray.config import ConfigError
from areal_ray.driver import preflight
from areal_ray.run import RunDir
from areal_ray.run.lease import hold_lease
from areal_ray.storage import LocalStorage
from areal_ray.tools.sweep import read_sweep
from areal_ray.tools.sweep import trial as trials

pytestmark = pytest.mark.unit
TINY = "conf/experiments/tiny.yaml"


@pytest.fixture
def written(tmp_path):
    def written(text):
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return str(path)

    return written


def test_a_file_is_read(written):
    space = read_sweep(written("space: {optim.lr: {log_uniform: [1e-4, 1e-2]}}\ntrials: 8\nscheduler: asha"))
    assert (space.trials, space.scheduler, space.mode) == (8, "asha", "min")


@pytest.mark.parametrize(
    ("text", "key", "part"),
    [
        ("[1]", "", "must hold a mapping"),
        ("trials: 3", "space", "at least one key"),
        ("space: {a: 3}", "space.a", "is one of grid, choice, uniform"),
        ("space: {a: {uniform: [1]}}", "space.a", "two numbers"),
        ("space: {a: {log_uniform: [0, 1]}}", "space.a", "a lower and a higher"),
        ("space: {a: {uniform: [x, 1]}}", "space.a", "two numbers, not"),
        ("space: {a: {grid: [1]}}\ntrails: 3", "trails", "no such key; there are: space, trials"),
        ("space: {a: {grid: [1]}}\nconcurrent: 0", "concurrent", "1 or more"),
        ("space: {a: {grid: [1]}}\nscheduler: pbt", "scheduler", "knows none, asha"),
        ("space: [", "", "while parsing"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(written, text, key, part):
    with pytest.raises(ConfigError, match=part) as caught:
        read_sweep(written(text))
    assert caught.value.key == key
    assert "space.yaml" in str(caught.value)


SET = "eval.sets={code: {source: text, paths: [/tmp/x], every_steps: 100}}"


@pytest.mark.parametrize(
    ("metric", "overrides", "said"),
    [
        ("held_out/code/loss", [SET, "eval.every_steps=null"], "run.name: as far as its data"),
        ("held_out/code/loss", [], "space.yaml: metric: must be held_out_loss or loss, not 'held_out/code/loss'"),
        ("held_out_loss", [SET, "eval.every_steps=null"], "space.yaml: metric: held_out_loss needs eval.every_steps"),
        ("ema_held_out_loss", [], "space.yaml: metric: ema_held_out_loss needs eval.ema"),
    ],
)
def test_it_judges_by_what_an_evaluation_gives(written, monkeypatch, capsys, metric, overrides, said):
    def prepare(config):
        raise ConfigError("run.name", "as far as its data")

    monkeypatch.setattr(preflight, "prepare", prepare)
    space = written(f"space: {{optim.lr: {{grid: [0.1]}}}}\nmetric: {metric}")
    assert run_cli(["sweep", "--config", TINY, "--space", space, *overrides]) == 2
    assert said in capsys.readouterr().err


LOGS = """
import sys, json
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
place, name = (dict(text.split("=", 1) for text in sys.argv[3:])[key] for key in ("run.storage_path", "run.name"))
run = RunDir(LocalStorage(f"{place}/{name}"))
run.storage.ensure()
print(json.dumps(sys.argv[1:]))
for step in (10, 20):
    run.log_metrics(step, {"loss": 1.0 / step} | ({"held_out_loss": 2.0 / step} if step == 20 else {}))
"""


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """A trial whose run does what a script does."""

    def make(script):
        monkeypatch.setattr(trials, "train_command", lambda: [sys.executable, "-c", script])
        made = trials.Trial.__new__(trials.Trial)
        made._trial_info = None
        made._logdir = str(tmp_path)
        monkeypatch.setattr(trials.Trial, "trial_id", "t1")
        own = {"metric": "held_out_loss", "name": "it", "overrides": ["a=1"], "config": "x.yaml", "address": "h:1"}
        own |= {"storage_path": str(tmp_path / "runs"), "folder": str(tmp_path)}
        made.setup({"optim.lr": 0.5, "areal_ray": own})
        return made

    return make


def test_a_trial_is_a_run_of_its_own_and_gives_its_evaluations(trial, tmp_path):
    made = trial(LOGS)
    assert made.step() == {"step": 20, "loss": 0.05, "held_out_loss": 0.1, "run": "it-t1", "done": False}
    assert made.step()["done"]
    made.cleanup()
    where = [f"run.storage_path={tmp_path / 'runs'}"]
    told = ["--config", "x.yaml", "a=1", "optim.lr=0.5", "run.name=it-t1", *where]
    assert json.loads((tmp_path / "run.log").read_text()) == told


def test_one_that_fails_says_where_its_output_is(trial, tmp_path):
    made = trial("raise SystemExit(2)")
    with pytest.raises(RuntimeError, match=f"run it-t1 ended with status 2; its output: {tmp_path}/run.log"):
        made.step()
    made.cleanup()


def test_one_that_is_stopped_early_is_asked_to_save_first(trial, tmp_path):
    made = trial("import signal; signal.pause()")
    run = RunDir(LocalStorage(tmp_path / "runs" / "it-t1"))
    run.storage.ensure()
    asked = []

    def ask(storage):
        asked.append(storage.location)
        made._process.kill()

    with hold_lease(run.storage, lambda: None, print, settle_s=0.0), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "ask_to_stop", ask)
        made.cleanup()
    assert asked == [run.storage.location]
