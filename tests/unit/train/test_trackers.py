"""Trackers, written for real and read back by their own libraries: each step once, whatever is killed."""

import importlib.util
import multiprocessing
import os
import threading

import pytest

from areal_ray.config import Config, ConfigError, TrackerConfig, load
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.train.sinks import MetricsFile
from areal_ray.train.trackers import Follower, build, build_tracker, check_tracker
from areal_ray.train.trackers.follower import Cursor

pytestmark = pytest.mark.unit
STEPS = list(range(1, 41))


def attempt(folder, tracker, after, to, workers, end):
    """An attempt of a run that goes on after a step on so many workers, in a process of its own."""
    os.environ.update({"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "MLFLOW_TRACKING_URI": ""})
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    own = [f"run.storage_path={folder}", f"trackers=[{{name: {tracker}}}]", f"cluster.num_workers={workers}"]
    config = load("conf/experiments/tiny.yaml", own)
    run = RunDir(LocalStorage(folder / "tiny"))
    run.storage.ensure()
    sinks = [MetricsFile(run, print), follower := build_tracker(config, 0, run, print)]
    follower._close_s = 120.0  # however busy the machine is
    for sink in sinks:
        sink.rewind(after)
    number = 1 + sum(event["event"] == "attempt" for event in run.each_event())
    run.event("attempt", attempt=number, world_size=workers)
    run.event("restored" if after > 0 else "started", attempt=number, step=max(0, after))
    for step in range(after + 1, to + 1):
        for sink in sinks:
            sink.log(step, {"loss": 100.0 - step, "lr": 0.001})
    run.event("saved", step=to, checkpoint=f"step-{to:08}.a{number}")
    if end == "resized":
        run.event("left", reason="resize", attempt=number, step=to)
    if end != "killed":
        follower.close()
        return
    # Killed in the middle: the tracker has some of the steps, or all, or none.
    taken = threading.Event()
    follower._add(lambda _: taken.set())
    taken.wait(1.0 if after < 0 else 0.0)
    os._exit(9)


def tensorboard_steps(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder / "tiny" / "tensorboard"), size_guidance={"scalars": 0})
    log.Reload()
    assert {"config/text_summary", "events/restored/text_summary"} <= set(log.Tags()["tensors"])
    return {event.step: event.value for event in log.Scalars("loss")}, len(log.Scalars("loss"))


def mlflow_steps(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/tiny/mlflow.db")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.data.params["train.steps"] == "200"
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss")
    return {metric.step: metric.value for metric in history}, len(history)


def wandb_steps(folder):
    from wandb.proto import wandb_internal_pb2

    from areal_ray.train.trackers.wandb import records

    found, runs = [], set()
    for path in sorted((folder / "tiny" / "wandb").glob("*run-*/*.wandb")):
        for data in records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                found.append((int(values["_step"]), float(values["loss"])))
            elif kind == "run":
                runs.add(record.run.run_id)
    assert len(runs) == 1
    return dict(found), len(found)


def trackio_steps(folder):
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    from trackio import sqlite_storage

    (run,) = sqlite_storage.SQLiteStorage.get_runs("areal_ray")
    lines = sqlite_storage.SQLiteStorage.get_logs("areal_ray", run)
    return {line["step"]: line["loss"] for line in lines}, len(lines)


@pytest.mark.parametrize(
    ("tracker", "read"),
    [("tensorboard", tensorboard_steps), ("mlflow", mlflow_steps), ("wandb", wandb_steps), ("trackio", trackio_steps)],
)
def test_each_step_stands_once_after_two_kills_and_two_resizes(tmp_path, tracker, read):
    if importlib.util.find_spec(tracker) is None:  # not imported here: each attempt does it, as a worker does
        pytest.skip(f"{tracker} is not installed")
    for given in ((-1, 20, 2, "killed"), (10, 30, 2, "resized"), (30, 35, 1, "killed"), (32, 40, 2, "finished")):
        process = multiprocessing.get_context("fork").Process(target=attempt, args=(tmp_path, tracker, *given))
        process.start()
        process.join()
        assert process.exitcode == (9 if given[-1] == "killed" else 0)
    values, count = read(tmp_path)
    assert {step: values[step] for step in STEPS} == {step: 100.0 - step for step in STEPS}
    assert count == len(values)


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self, fails=""):
        self.fails, self.calls = fails, []
        self.told("make")

    def told(self, what, *args):
        self.calls.append((what, *args))
        if what == self.fails:
            raise ConnectionError("nobody there")

    def log(self, step, values):
        self.told("log", step)

    def rewind(self, step):
        self.told("rewind", step)

    def close(self):
        self.told("close")


@pytest.fixture
def run(tmp_path):
    made = RunDir(LocalStorage(tmp_path / "run"))
    made.storage.ensure()
    return made


def follow(run, make, said, close_s=10.0):
    return Follower("mine:Kept", make, run, Cursor(run, "0-Kept"), said.append, close_s)


@pytest.mark.parametrize("fails", ["make", "log", "rewind", "close"])
def test_a_tracker_that_fails_is_left_out_and_said_once(run, fails):
    said, made = [], []

    def make():
        made.append(Kept.__new__(Kept))
        made[0].__init__(fails)
        return made[0]

    tracker = follow(run, make, said)
    for _ in range(2):
        tracker.rewind(0)
        tracker.log(1, {})
    tracker.close()
    assert said == ["the tracker mine:Kept failed, and is left out from now on: ConnectionError: nobody there"]
    assert made[0].calls[-1][0] == fails


def test_the_id_of_a_run_stands_before_the_tracker_hears_of_it(run):
    ids = []
    cursor = Cursor(run, "0-Kept")
    make = lambda: ids.append(Cursor(run, "0-Kept").id) or Kept()  # noqa: E731  (killed here, the next start reads that)
    Follower("mine:Kept", make, run, cursor, print).close()
    assert ids == [cursor.id]


def test_an_end_that_takes_too_long_is_not_waited_for(run):
    said, end = [], threading.Event()
    kept = Kept()
    kept.close = end.wait
    follow(run, lambda: kept, said, close_s=0.01).close()
    end.set()
    assert said == ["the tracker mine:Kept has not closed in 0 s"]


def test_a_tracker_that_takes_nothing_for_a_while_gets_all_of_it_later_in_order(run, monkeypatch):
    monkeypatch.setattr("areal_ray.train.trackers.follower._WAITING", 3)
    said, going_on, kept = [], threading.Event(), Kept()
    take = kept.log
    kept.log = lambda step, values: going_on.wait() and take(step, values)
    sinks = [MetricsFile(run, print), tracker := follow(run, lambda: kept, said)]
    for step in range(1, 11):
        for sink in sinks:
            sink.log(step, {"loss": 1.0})
    going_on.set()
    for sink in sinks:
        sink.log(11, {"loss": 1.0})
    tracker.close()
    assert [call[1] for call in kept.calls if call[0] == "log"] == list(range(1, 12))
    assert said == ["the tracker mine:Kept takes nothing after step -1: it gets the rest later"]


def test_one_that_comes_later_gets_what_there_was_and_one_that_was_ahead_goes_back(run):
    for step in (1, 2, 3):
        run.log_metrics(step, {"loss": 1.0})
    first = Kept()
    late = follow(run, lambda: first, [])
    late.rewind(3)
    late.close()
    assert first.calls[1:] == [("rewind", -1), ("log", 1), ("log", 2), ("log", 3), ("close",)]
    again = Kept()
    back = follow(run, lambda: again, [])
    back.rewind(1)
    back.log(2, {})
    back.close()
    assert again.calls[1:] == [("rewind", 1), ("log", 2), ("close",)]


def test_what_a_library_takes_to_import_is_not_waited_for(run, monkeypatch):
    imported, kept = threading.Event(), Kept()
    monkeypatch.setattr(build, "_find", lambda *_: imported.wait(30.0) and (lambda: kept))
    tracker = build_tracker(Config(trackers=[TrackerConfig(f"{__name__}:Kept")]), 0, run, print)
    for sink in (MetricsFile(run, print), tracker):
        sink.log(1, {"loss": 1.0})
    imported.set()
    tracker.close()
    assert kept.calls[1:] == [("log", 1), ("close",)]


def test_a_tracker_of_one_s_own_is_made_with_its_args(run):
    config = Config(trackers=[TrackerConfig(f"{__name__}:Kept", {"fails": "log"})])
    said = []
    tracker = build_tracker(config, 0, run, said.append)
    tracker.log(1, {})
    tracker.close()
    assert "failed, and is left out" in said[0]
    with pytest.raises(ConfigError, match="has no Nothing") as caught:
        check_tracker(TrackerConfig(f"{__name__}:Nothing"), "trackers[0]")
    assert caught.value.key == "trackers[0].name"
    with pytest.raises(ConfigError, match="unexpected keyword argument 'folder'"):
        check_tracker(TrackerConfig("tensorboard", {"folder": "x"}), "trackers[0]")
