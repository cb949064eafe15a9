"""Runs a sweep on Ray Tune."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from areal_ray.config import Config
from areal_ray.tools.sweep.space import Sweep


def sweep(config: Config, path: str, overrides: Sequence[str], space: Sweep, address: str) -> list[dict[str, Any]]:
    """Run the trials of a sweep, or go on with those that are not done.

    Args:
        config: of the experiment, with an absolute storage path; the sweep has its run's name.
        path: of the experiment.
        overrides: key=value strings for all trials.
        space: what is tried.
        address: host:port of the cluster, to which this process is connected.

    Returns:
        The last result of each trial, the best one first: values of the space by key, step, metric, run.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # lines of our own
    from ray import tune

    from areal_ray.tools.sweep.progress import Progress
    from areal_ray.tools.sweep.trial import Trial

    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    root, name = config.run.storage_path, f"{config.run.name}-sweep"
    own = {
        "metric": space.metric,
        "name": config.run.name,
        "overrides": list(overrides),
        "config": str(Path(path).resolve()),
        "storage_path": root,
        "folder": str(Path.cwd()),
        "address": address,
    }
    # The runs' workers take the resources; a trial only looks after its run. Tune does not take 0.
    trainable = tune.with_resources(Trial, {"cpu": 0.001})
    place = f"{root.rstrip('/')}/{name}"
    values = {**_domains(space), "areal_ray": own}
    if tune.Tuner.can_restore(place):
        print(f"going on with {place}", flush=True)
        tuner = tune.Tuner.restore(
            place,
            trainable,
            resume_unfinished=True,
            restart_errored=True,
            param_space=values,
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=values,
            tune_config=tune.TuneConfig(
                metric=space.metric,
                mode=space.mode,
                num_samples=space.trials,
                scheduler=_scheduler(space, config),
                search_alg=tune.search.BasicVariantGenerator(random_state=space.seed, max_concurrent=space.concurrent),
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=root,
                verbose=0,
                callbacks=[Progress(space)],
                failure_config=tune.FailureConfig(max_failures=3),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
    results = tuner.fit()
    rows = [_row(space, result) for result in results]
    sign = 1 if space.mode == "min" else -1
    return sorted(rows, key=lambda row: sign * row[space.metric] if row[space.metric] is not None else float("inf"))


def _row(space: Sweep, result: Any) -> dict[str, Any]:
    values = result.metrics or {}
    tried = {key: (result.config or {}).get(key) for key in space.space}
    error = None if result.error is None else " ".join(str(result.error).split())[-200:]
    return {
        **tried,
        "step": values.get("step"),
        space.metric: values.get(space.metric),
        "run": values.get("run"),
        "error": error,
    }


def _domains(space: Sweep) -> dict[str, Any]:
    from ray import tune

    made: dict[str, Any] = {}
    for key, what in space.space.items():
        ((kind, values),) = what.items()
        if kind == "grid":
            made[key] = tune.grid_search(values)
        elif kind == "choice":
            made[key] = tune.choice(values)
        else:
            low, high = float(values[0]), float(values[1])
            domains: Mapping[str, Any] = {
                "uniform": lambda low=low, high=high: tune.uniform(low, high),
                "log_uniform": lambda low=low, high=high: tune.loguniform(low, high),
                "int_uniform": lambda low=low, high=high: tune.randint(int(low), int(high) + 1),
            }
            made[key] = domains[kind]()
    return made


def _scheduler(space: Sweep, config: Config) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if space.scheduler == "none":
        return FIFOScheduler()
    limits = {"grace_period": space.grace_steps, "reduction_factor": space.reduction_factor}
    return ASHAScheduler(time_attr="step", max_t=config.train.steps, **limits)
