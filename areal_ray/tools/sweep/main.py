"""Runs a sweep on Ray Tune."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from areal_ray.config import Config, ConfigError
from areal_ray.run import RunDir
from areal_ray.run.lease import RunInUse, hold_lease, wait_until_free
from areal_ray.storage import Storage, storage_at
from areal_ray.tools.sweep.draw import draw
from areal_ray.tools.sweep.record import Record
from areal_ray.tools.sweep.space import Sweep

_TUNE = "tune"  # folder of Tune's own files; they are not read again


class SweepFolder:
    """`<run.storage_path>/<run.name>-sweep`, with the record of a sweep and the output of its runs.

    Args:
        config: of the experiment; the sweep has its run's name.
        space: what is tried.

    Raises:
        ConfigError: if there is a sweep of something else.
        ValueError: if run.storage_path is no place.
    """

    def __init__(self, config: Config, space: Sweep) -> None:
        root = storage_at(config.run.storage_path)
        self.root, self.name = root.location, config.run.name
        self.storage: Storage = root.sub(f"{self.name}-sweep")
        self.space = space
        self.record = Record(self.storage, space, draw(space), self.name)

    def history(self) -> dict[str, list[dict[str, Any]]]:
        """The evaluations of every trial so far, oldest first, by its name."""
        found = {}
        for name, trial in self.record.trials().items():
            run = RunDir(storage_at(self.root).sub(trial["run"]))
            lines = run.metrics() if run.exists() else []
            found[name] = [line for line in lines if self.space.metric in line]
        return {name: lines for name, lines in found.items() if lines}

    def rows(self, errors: dict[str, str] | None = None) -> list[dict[str, Any]]:
        """The last result of each trial, the best one first: values of the space by key, step, metric, run, error."""
        metric, rows = self.space.metric, []
        for name, trial in self.record.trials().items():
            last = trial["ended"] or {}
            error = (errors or {}).get(name)
            value = last.get(metric)
            rows.append(
                {**trial["values"], "step": last.get("step"), metric: value, "run": trial["run"], "error": error}
            )
        sign = 1 if self.space.mode == "min" else -1
        # What is no number (nan) is not the best of all.
        return sorted(rows, key=lambda row: sign * row[metric] if _is_number(row[metric]) else float("inf"))


def sweep(folder: SweepFolder, steps: int, path: str, overrides: Sequence[str], address: str) -> list[dict[str, Any]]:
    """Train the trials that have not ended: those of an interrupted sweep go on where their runs are.

    Args:
        folder: of the sweep.
        steps: of the longest trial.
        path: of the experiment.
        overrides: key=value strings for all trials.
        address: host:port of the cluster, to which this process is connected.

    Returns:
        As `SweepFolder.rows`.

    Raises:
        ConfigError: if another process drives this sweep, or has done so since its record was read.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # lines of our own
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the runs have logs
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # one trial may end without an evaluation
    folder.storage.ensure()
    try:
        with hold_lease(folder.storage, lambda: None, print):
            if not folder.record.is_current():
                text = f"another process has just gone on with {folder.storage.location}; the same command says how far"
                raise ConfigError("run.name", text)
            return folder.rows(_train(folder, steps, path, overrides, address))
    except RunInUse as error:
        raise ConfigError("run.name", str(error)) from None


def _train(folder: SweepFolder, steps: int, path: str, overrides: Sequence[str], address: str) -> dict[str, str]:
    """Run Tune; what the trials that have failed say, by their names."""
    from ray import tune

    from areal_ray.tools.sweep.progress import Progress
    from areal_ray.tools.sweep.schedulers import build
    from areal_ray.tools.sweep.trial import Trial

    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A trial is a process of its own in any case.
    warnings.filterwarnings("ignore", "Consider boosting PBT performance", UserWarning)
    record, space, history = folder.record, folder.space, folder.history()
    record.write()
    place = folder.storage.location
    left = record.open()
    if record.goes_on:
        print(f"going on with {place}: {len(left)} of {len(record.trials())} trials are left", flush=True)
    shutil.rmtree(f"{place}/{_TUNE}", ignore_errors=True)  # of an earlier start: everything is told to Tune anew
    tried = [
        {
            "name": name,
            **{key: record.trials()[name][key] for key in ("run", "values")},
            "seen": history[name][-1]["step"] if name in history else -1,
        }
        for name in left
    ]
    own = {
        "metric": space.metric,
        "overrides": list(overrides),
        "config": str(Path(path).resolve()),
        "storage_path": folder.root,
        "sweep": place,
        "folder": str(Path.cwd()),
        "address": address,
    }
    tuner = tune.Tuner(
        # The runs' workers take the resources; a trial only looks after its run. Tune does not take nothing at all, and
        # with any share of a CPU a worker would find less than the one that it needs.
        tune.with_resources(Trial, {"cpu": 0, "memory": 1}),
        param_space={"trial": tune.grid_search(tried), "areal_ray": own},
        tune_config=tune.TuneConfig(
            metric=space.metric,
            mode=space.mode,
            scheduler=build(space, steps, history),
            search_alg=tune.search.BasicVariantGenerator(max_concurrent=space.concurrent),
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=_TUNE,
            storage_path=place,
            verbose=0,
            callbacks=[Progress(space.metric, record)],
            failure_config=tune.FailureConfig(max_failures=3),
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_at_end=False, checkpoint_frequency=int(space.scheduler == "pbt")
            ),
        ),
    )
    results = tuner.fit()
    for name in record.open():  # interrupted: their runs save and leave, for which there must be a cluster
        wait_until_free(storage_at(folder.root).sub(record.trials()[name]["run"]))
    return errors_of(left, results)


def errors_of(trials: Sequence[str], results: Iterable[Any]) -> dict[str, str]:
    """What the trials that have failed say, by their names.

    Args:
        trials: names, in the order in which Tune makes them.
        results: Tune's, in the same order; the last ones lack if the sweep was interrupted before they were made.
    """
    found = zip(trials, results, strict=False)
    return {name: " ".join(str(each.error).split())[-200:] for name, each in found if each.error is not None}


def _name(trial: Any) -> str:
    """The name of a trial, for Tune."""
    return str(trial.config["trial"]["name"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value
