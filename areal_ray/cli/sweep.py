"""areal-ray sweep: many runs of one experiment."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import Any


def sweep(config: Any, arguments: argparse.Namespace) -> int:
    """Run a sweep on the cluster of RAY_ADDRESS, or one of its own; prints its trials, the best one first.

    Raises:
        ConfigError: for what `train` refuses, and for mistakes in the file of the sweep.
    """
    from areal_ray.cli.jobs import refuse_secrets
    from areal_ray.cli.runs import aligned
    from areal_ray.config import ConfigError, load
    from areal_ray.config.eval_rules import check_metric
    from areal_ray.tools.sweep import read_sweep

    refuse_secrets(arguments.overrides)  # the commands of the trials stand in the list of processes
    if "://" in config.run.storage_path:
        text = "of a sweep must be a folder that all nodes see: Ray Tune keeps its state there, too"
        raise ConfigError("run.storage_path", text)
    space = read_sweep(arguments.space)
    try:
        check_metric(config, space.metric, "metric", "loss")
    except ConfigError as error:
        raise ConfigError(error.key, error.message, arguments.space) from None
    for key, what in space.space.items():  # a key that there is not, or a value, is found here and not in every trial
        for value in next(iter(what.values())):
            load(arguments.config, [*arguments.overrides, f"{key}={value}"])
    from areal_ray.driver.connect import cluster, use_token
    from areal_ray.driver.preflight import prepare

    _, config, _ = prepare(config)
    if os.environ.get("RAY_ADDRESS"):
        use_token()
    # Of its own cluster it needs room for the workers of all trials that train at the same time.
    workers = config.worker_range[1] * space.concurrent + 1
    roomy = replace(config, cluster=replace(config.cluster, num_workers=workers, standbys="off"))
    with cluster(roomy, fast=False):
        import ray

        from areal_ray.tools.sweep import sweep

        address = ray.get_runtime_context().gcs_address
        rows = sweep(config, arguments.config, arguments.overrides, space, address)
    heads = [*space.space, "step", space.metric, "run"]
    table = [[_short(row[head]) for head in heads] for row in rows]
    print(f"\n{aligned([heads, *table], left=0)}")
    failed = [row for row in rows if row["error"]]
    for row in failed:
        print(f"{row['run']}: {row['error']}")
    return 1 if failed else 0


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
