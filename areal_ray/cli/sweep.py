"""areal-ray sweep: many runs of one experiment."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import Any


def sweep(config: Any, arguments: argparse.Namespace) -> int:
    """Run a sweep on the cluster of RAY_ADDRESS, or one of its own; prints its trials, the best one first.

    Raises:
        ConfigError: for what `train` refuses, of any trial, and for mistakes in the file of the sweep.
    """
    from areal_ray.cli.jobs import refuse_secrets
    from areal_ray.config import ConfigError
    from areal_ray.driver.connect import cluster, unreachable, use_token

    if os.environ.get("RAY_ADDRESS"):
        use_token()  # before the checks of the trials, which import ray
        if problem := unreachable():
            raise ConfigError("", problem, "RAY_ADDRESS")
    from areal_ray.tools.sweep import SweepFolder, read_sweep, sweep

    refuse_secrets(arguments.overrides)  # the commands of the trials stand in the list of processes
    if "://" in config.run.storage_path:
        text = "of a sweep must be a folder that all nodes see: Ray Tune keeps its state there, too"
        raise ConfigError("run.storage_path", text)
    space = read_sweep(arguments.space)
    try:
        folder = SweepFolder(config, space)
    except ConfigError as error:
        raise ConfigError(error.key, error.message, arguments.space) from None
    except ValueError as error:
        raise ConfigError("run.storage_path", str(error)) from None
    steps = _check_trials(folder, arguments)
    if not folder.record.open():
        print(f"{config.run.name}: all {len(folder.record.trials())} trials have ended")
        return _show(folder.rows(), space)
    # Of its own cluster it needs room for the workers of all trials that train at the same time.
    workers = config.worker_range[1] * min(space.concurrent, len(folder.record.open())) + 1
    roomy = replace(config, cluster=replace(config.cluster, num_workers=workers, standbys="off"))
    with cluster(roomy, fast=False):
        import ray

        address = ray.get_runtime_context().gcs_address
        rows = sweep(folder, steps, arguments.config, arguments.overrides, address)
    status = _show(rows, space)
    if not status and (left := folder.record.open()):
        print(
            f"interrupted: {len(left)} of {len(folder.record.trials())} trials have not ended; the same command goes on"
        )
        return 130
    return status


def _check_trials(folder: Any, arguments: argparse.Namespace) -> int:
    """Check every trial that is left as `train` would; steps of the longest.

    Loading a configuration takes milliseconds; model and data are looked at once for all trials that do not differ in
    them.
    """
    from areal_ray.config import ConfigError, load
    from areal_ray.config.eval_rules import check_metric
    from areal_ray.driver.preflight import prepare
    from areal_ray.tools.sweep.draw import PLAIN, ends, overrides

    space, record, source = folder.space, folder.record, arguments.space
    place = f"run.storage_path={folder.root}"

    def of(name: str, values: dict[str, Any]) -> Any:
        return load(arguments.config, [*arguments.overrides, *overrides(values), f"run.name={name}", place])

    if space.scheduler == "pbt":
        _check_population(folder, [of(f"{folder.name}-00", end) for end in ends(space)], source)
    seen: dict[tuple[str, ...], int] = {}
    for name in record.open():
        trial = record.trials()[name]
        values = trial["values"]
        try:
            config = of(trial["run"], values)
            check_metric(config, space.metric, "metric", "loss")
            built = tuple(str(value) for key, value in values.items() if key not in PLAIN)
            if built not in seen:
                seen[built] = prepare(config)[1].train.steps
        except ConfigError as error:
            raise _of_trial(error, name, values, source) from None
    return max(seen.values(), default=0)


def _of_trial(error: Any, name: str, values: dict[str, Any], source: str) -> Any:
    """An error of a trial's configuration, in terms of the sweep's file."""
    from areal_ray.config import ConfigError

    if error.key == "metric":
        return ConfigError("metric", error.message, source)
    tried = ", ".join(f"{key}={_short(value)}" for key, value in values.items())
    key = f"space.{error.key}" if error.key in values else error.key
    return ConfigError(key, f"{error.message} (trial {name}: {tried})", source if error.key in values else error.source)


def _check_population(folder: Any, configs: list[Any], source: str) -> None:
    """Raise ConfigError for what pbt cannot do.

    Args:
        folder: of the sweep.
        configs: with what it may make of each key.
        source: the sweep's file.
    """
    from areal_ray.config import ConfigError
    from areal_ray.tools.sweep.draw import PLAIN, fixed_key

    space, count = folder.space, len(folder.record.trials())
    if (key := fixed_key(space)) is not None:
        known = ", ".join([*PLAIN, "objective.args.*"])
        text = f"a run cannot go on with another value of it, as pbt would have it; it can with {known}"
        raise ConfigError(f"space.{key}", text, source)
    if count < 2:
        raise ConfigError("trials", "pbt takes 2 or more, that learn from each other", source)
    if space.concurrent < count:
        raise ConfigError("concurrent", f"must be {count}: with pbt all trials train at the same time", source)
    for config in configs:
        every = config.checkpoint.every_steps
        if every is None or every > space.perturb_steps:
            text = f"must be {space.perturb_steps} or less, the sweep's perturb_steps: pbt goes on from checkpoints"
            raise ConfigError("checkpoint.every_steps", text)


def _show(rows: list[dict[str, Any]], space: Any) -> int:
    """Print the table of trials and what went wrong; the exit status."""
    from areal_ray.cli.runs import aligned

    heads = [*space.space, "step", space.metric, "run"]
    table = [[_short(row[head]) for head in heads] for row in rows]
    print(f"\n{aligned([heads, *table], left=0)}")
    failed = [row for row in rows if row["error"]]
    for row in failed:
        print(f"{row['run']}: {row['error']}")
    return 1 if failed else 0


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
