"""Sweeps: their file, and trials that are runs."""

import json
import sys
from types import SimpleNamespace

import pytest

from areal_ray.checkpoint import Catalog
from areal_ray.checkpoint.format.manifest import FileRecord, Manifest
from areal_ray.cli.main import main as run_cli
from areal_ray.config import ConfigError, load
from areal_ray.driver import preflight
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.tools.sweep import SweepFolder, read_sweep
from areal_ray.tools.sweep import trial as trials
from areal_ray.tools.sweep.draw import clamp, draw
from areal_ray.tools.sweep.fork import fork
from areal_ray.tools.sweep.main import errors_of
from areal_ray.tools.sweep.schedulers import Halving

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
        ("space: {a: {grid: [1]}}\nscheduler: bohb", "scheduler", "knows none, asha, pbt, not 'bohb'"),
        ("space: {a: {grid: [1]}}\nreduction_factor: 1", "reduction_factor", "2 or more"),
        ("space: {a: {grid: [1]}}\nquantile: 0.6", "quantile", "0.5 at most"),
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

    def make(script, name="it-0", seen=-1):
        monkeypatch.setattr(trials, "train_command", lambda: [sys.executable, "-c", script])
        made = trials.Trial.__new__(trials.Trial)
        monkeypatch.setattr(trials.Trial, "trial_name", name)
        own = {"metric": "held_out_loss", "overrides": ["a=1"], "config": "x.yaml", "address": "h:1"}
        own |= {"storage_path": str(tmp_path / "runs"), "sweep": str(tmp_path), "folder": str(tmp_path)}
        tried = {"name": "it-0", "run": "it-0", "values": {"optim.lr": 0.5}, "seen": seen}
        made.setup({"trial": tried, "areal_ray": own})
        return made

    return make


def test_a_trial_is_a_run_of_its_own_and_gives_its_evaluations(trial, tmp_path):
    made = trial(LOGS)
    assert made.step() == {"step": 20, "loss": 0.05, "held_out_loss": 0.1, "run": "it-0", "done": False}
    assert made.step() == {"step": 20, "loss": 0.05, "held_out_loss": 0.1, "run": "it-0", "done": True}
    made.cleanup()
    where = [f"run.storage_path={tmp_path / 'runs'}"]
    told = ["--config", "x.yaml", "a=1", "optim.lr=0.5", "run.name=it-0", *where]
    assert json.loads((tmp_path / "it-0.log").read_text()) == told


def test_what_was_told_before_is_not_told_again(trial, tmp_path):
    RunDir(LocalStorage(tmp_path / "runs" / "it-0")).storage.ensure()
    RunDir(LocalStorage(tmp_path / "runs" / "it-0")).log_metrics(5, {"held_out_loss": 9.0})
    made = trial(LOGS, seen=5)
    assert made.step()["step"] == 20
    made.cleanup()
    made = trial("pass", seen=20)
    assert made.step() == {"step": 20, "loss": 0.05, "held_out_loss": 0.1, "run": "it-0", "done": True}
    made.cleanup()


def test_one_that_fails_says_where_its_output_is(trial, tmp_path):
    made = trial("raise SystemExit(2)")
    with pytest.raises(RuntimeError, match=f"run it-0 ended with status 2; its output: {tmp_path}/it-0.log"):
        made.step()
    made.cleanup()


@pytest.mark.parametrize(("last_step", "is_asked"), [(30, True), (20, False)])
def test_one_that_is_stopped_early_is_asked_to_save_first(trial, tmp_path, last_step, is_asked):
    made = trial(LOGS + "import signal; signal.pause()")
    assert made.step()["step"] == 20
    run, asked = made._run, []
    run.event("submitted", last_step=last_step)

    def ask(storage):
        asked.append(storage.location)
        made._process.kill()

    if not is_asked:  # it has only to finish
        made._process.kill()
        made._process.wait()
        made._process.poll = lambda: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "ask_to_stop", ask)
        made.cleanup()
    assert asked == [run.storage.location] * is_asked


def test_with_another_one_s_checkpoint_it_goes_on_in_a_new_run(trial, tmp_path, monkeypatch):
    forked = []

    def fork(source, target, step):
        forked.append((source.location, target.location, step))
        target.ensure()
        return "step-00000010.a1"

    monkeypatch.setattr(trials, "fork", fork)
    made, runs = trial(LOGS, name="it-1"), tmp_path / "runs"
    (runs / "it-1-g1").mkdir(parents=True)
    (runs / "it-1-g1" / "config.yaml").touch()
    made.load_checkpoint({"trial": "it-0", "run": "it-0-g3", "seen": 10, "evaluated": {"step": 10}})
    assert forked == [(str(runs / "it-0-g3"), str(runs / "it-1-g2"), 10)]
    kept = made.save_checkpoint("")
    assert kept == {"trial": "it-1", "run": "it-1-g2", "seen": -1, "evaluated": {"step": 10, "run": "it-1-g2"}}
    made.load_checkpoint({**kept, "seen": 10})
    assert len(forked) == 1
    assert made.step()["run"] == "it-1-g2"
    made.cleanup()


def checkpoint(run, step):
    """A committed checkpoint, as far as names, sizes and the manifest go."""
    place = run / f"step-{step:08}.a1"
    place.mkdir(parents=True)
    (place / "shard-00000.distcp").write_text("content")
    manifest = Manifest({"step": step, "attempt": 1}, {"shard-00000.distcp": FileRecord(7, "")})
    (place / "manifest.json").write_bytes(manifest.encode())


def test_a_fork_begins_with_the_newest_checkpoint_until_a_step(tmp_path):
    a, b = LocalStorage(tmp_path / "a"), LocalStorage(tmp_path / "b")
    for step in (10, 20, 30):
        checkpoint(tmp_path / "a", step)
    assert fork(a, b, step=25, wait_s=0) == "step-00000020.a1"
    assert Catalog(b).newest().step == 20
    ours, theirs = (tmp_path / run / "step-00000020.a1" / "shard-00000.distcp" for run in "ab")
    assert ours.stat().st_ino == theirs.stat().st_ino
    assert sorted(path.name for path in theirs.parent.iterdir()) == ["manifest.json", "shard-00000.distcp"]
    assert fork(a, LocalStorage(tmp_path / "c"), step=5, wait_s=0) == "step-00000010.a1"
    with pytest.raises(RuntimeError, match="has no checkpoint to go on from"):
        fork(LocalStorage(tmp_path / "d"), LocalStorage(tmp_path / "e"), step=5, wait_s=0)


def test_trials_are_drawn_before_anything_starts_and_stay_the_same(written):
    text = "space: {a: {grid: [1, 2]}, b: {uniform: [3, 4]}, c: {int_uniform: [5, 6]}, d: {choice: [x, y]}}\ntrials: "
    few, many = draw(read_sweep(written(f"{text}2"))), draw(read_sweep(written(f"{text}5")))
    assert (len(few), len(many)) == (4, 10)
    assert few == many[:4]
    assert [trial["a"] for trial in many] == [1, 2] * 5
    assert all(3 <= t["b"] <= 4 and t["c"] in (5, 6) and t["d"] in ("x", "y") for t in many)
    assert len({trial["b"] for trial in many}) == 10
    assert clamp(read_sweep(written(f"{text}2")), {"a": 1, "b": 9.0, "c": 4, "d": "x"})["b"] == 4
    assert clamp(read_sweep(written(f"{text}2")), {"a": 1, "b": 0.0, "c": 4, "d": "x"})["c"] == 5


def test_an_interrupted_sweep_goes_on_with_what_has_not_ended(written, tmp_path):
    config = load(TINY, [f"run.storage_path={tmp_path}", "run.name=it"])
    space = read_sweep(written("space: {optim.lr: {grid: [0.1, 0.2, 0.3]}}"))
    folder = SweepFolder(config, space)
    folder.storage.ensure()
    assert folder.record.open() == ["it-00", "it-01", "it-02"]
    folder.record.note("it-01", "it-01-g1", {"optim.lr": 0.25})
    folder.record.end("it-01", 20, 1.5)
    folder.record.end("it-00", 20, float("nan"))
    RunDir(LocalStorage(tmp_path / "it-02")).storage.ensure()
    RunDir(LocalStorage(tmp_path / "it-02")).log_metrics(5, {"held_out_loss": 9.0})
    RunDir(LocalStorage(tmp_path / "it-02")).log_metrics(6, {"loss": 9.0})
    again = SweepFolder(config, space)
    assert again.record.open() == ["it-02"]
    assert again.record.is_current()
    assert not folder.record.is_current()
    assert again.history() == {"it-02": [{"step": 5, "held_out_loss": 9.0}]}
    rows = again.rows({"it-02": "failed"})
    assert (rows[0]["run"], rows[0]["optim.lr"], rows[0]["step"]) == ("it-01-g1", 0.25, 20)
    assert [row["error"] for row in rows] == [None, None, "failed"]
    more = SweepFolder(config, read_sweep(written("space: {optim.lr: {grid: [0.1, 0.2, 0.3]}}\ntrials: 2")))
    assert more.record.open() == ["it-02", "it-03", "it-04", "it-05"]
    many = SweepFolder(config, read_sweep(written("space: {optim.lr: {grid: [0.1, 0.2, 0.3]}}\ntrials: 40")))
    assert (many.record.open()[0], many.record.open()[-1], len(many.record.open())) == ("it-02", "it-119", 118)
    for text, key in (("space: {optim.lr: {grid: [0.1, 0.2]}}", "space"), ("metric: loss", "metric")):
        given = text if key == "space" else f"space: {{optim.lr: {{grid: [0.1, 0.2, 0.3]}}}}\n{text}"
        with pytest.raises(ConfigError, match=f"{key} was .*; choose another run.name"):
            SweepFolder(config, read_sweep(written(given)))
    (tmp_path / "it-sweep" / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged: move it away"):
        SweepFolder(config, space)


def test_what_has_failed_is_known_by_its_trial_also_where_others_have_not_begun():
    results = [SimpleNamespace(error=None), SimpleNamespace(error=RuntimeError("run it-02\nended"))]
    assert errors_of(["it-00", "it-02", "it-03"], results) == {"it-02": "run it-02 ended"}


def test_successive_halving_remembers_earlier_starts():
    def judged(history, name, step, loss):
        halving = Halving(history, time_attr="step", max_t=101, grace_period=10, reduction_factor=2)
        halving.set_search_properties("held_out_loss", "min")
        halving.on_trial_add(None, name)
        return halving.on_trial_result(None, name, {"step": step, "held_out_loss": loss})

    before = {"it-0": [{"step": 10, "held_out_loss": 1.0}, {"step": 20, "held_out_loss": 0.9}]}
    assert judged({}, "it-1", 10, 2.0) == "CONTINUE"
    assert judged(before, "it-1", 10, 2.0) == "STOP"
    assert judged(before, "it-1", 10, 0.5) == "CONTINUE"
    assert judged(before, "it-0", 20, 9.0) == "CONTINUE"  # of that it was judged before


@pytest.mark.parametrize(
    ("space", "overrides", "said"),
    [
        ("space: {optim.lr: {grid: [0.1, -1]}}", [], "space.yaml: space.optim.lr: must be greater than 0"),
        (
            "space: {eval.every_steps: {grid: [5, null]}}",
            [],
            "space.yaml: metric: held_out_loss needs eval.every_steps",
        ),
        (
            "space: {model.config.hidden_size: {grid: [64]}}\nscheduler: pbt\ntrials: 2\nconcurrent: 2",
            [],
            "space.yaml: space.model.config.hidden_size: a run cannot go on with another value",
        ),
        ("space: {optim.lr: {uniform: [0.1, 1]}}\nscheduler: pbt", [], "space.yaml: trials: pbt takes 2 or more"),
        (
            "space: {optim.lr: {uniform: [0.1, 1]}}\nscheduler: pbt\ntrials: 3\nconcurrent: 2",
            [],
            "space.yaml: concurrent: must be 3: with pbt",
        ),
        (
            "space: {optim.lr: {uniform: [0.1, 1]}}\nscheduler: pbt\ntrials: 2\nconcurrent: 2\nperturb_steps: 20",
            ["checkpoint.every_steps=50"],
            "command line: checkpoint.every_steps: must be 20 or less",
        ),
    ],
)
def test_every_trial_is_checked_before_anything_starts(written, monkeypatch, capsys, space, overrides, said):
    monkeypatch.setattr(preflight, "prepare", lambda config: (None, config, None))
    place = ["run.storage_path=/nowhere", *overrides]
    assert run_cli(["sweep", "--config", TINY, "--space", written(space), *place]) == 2
    assert said in capsys.readouterr().err
