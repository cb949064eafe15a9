"""areal-ray doctor: what a run will meet, before it starts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

_SIGNS = {"ok": "ok  ", "note": "note", "bad": "BAD "}


def doctor(config: Any, arguments: argparse.Namespace) -> int:
    """Look at everything, here and on the cluster of RAY_ADDRESS; the exit status is 1 if anything is bad.

    Raises:
        ConfigError: for what `train` refuses.
    """
    from areal_ray.storage import storage_at
    from areal_ray.tools.doctor import Finding, local_findings

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    bad = _print([Finding("ok", "configuration", f"{arguments.config}: {config.length}")])
    from areal_ray.driver.data import NotPrepared, leave_unprepared
    from areal_ray.driver.memory import estimator
    from areal_ray.driver.opening import opening
    from areal_ray.driver.preflight import prepare

    try:
        given, lines = config, list[str]()
        run, config, _ = prepare(given, leave_unprepared, lambda *seen: lines.extend(opening(given, *seen)))
        text = f"as `train` checks them; run directory {run.storage.location}"
        bad += _print([Finding("ok", "model, run, data", text)])
        bad += _print(Finding("ok", *line.split(": ", 1)) for line in lines)
        bad += _print(_rate(run, config))
    except NotPrepared as error:
        data = replace(given.data, tokenizer=error.config.data.tokenizer)
        config = replace(given, model=error.config.model, data=data)  # model.path may be that of a run
        text = f"{error.bytes / 1e6:,.0f} MB are not prepared yet: `areal-ray prepare` or the first start does that"
        bad += _print([Finding("ok", "model, run", "as `train` checks them"), Finding("note", "data", text)])
    storage = storage_at(config.run.storage_path, asdict(config.run.s3))
    needs = estimator(config)
    bad += _print(local_findings(config, storage, needs))
    bad += _print([_upload()])
    if os.environ.get("RAY_ADDRESS"):
        bad += _on_cluster(config, storage, needs)
    else:
        _print([Finding("note", "cluster", "RAY_ADDRESS is not set: `train` makes one on this machine")])
    print("\nnothing stands in the way" if not bad else f"\n{bad} thing{'s' * (bad != 1)} to mend")
    return 1 if bad else 0


def _rate(run: Any, config: Any) -> Iterator[Any]:
    """Whether a run that goes on does so at its learning rate."""
    from areal_ray.checkpoint import Catalog
    from areal_ray.driver.rate_jump import rate_jump
    from areal_ray.tools.doctor import Finding

    newest = Catalog(run.storage).newest()
    if newest is not None and newest.info.get("config"):  # older ones do not say how they were trained
        jump = rate_jump(newest, config)
        text = f"goes on from step {newest.step} as it was"
        yield Finding("note" if jump else "ok", "learning rate", jump or text)


def _upload() -> Any:
    from areal_ray.config import ConfigError
    from areal_ray.driver.jobs.upload import check_size
    from areal_ray.tools.doctor import Finding

    try:
        check_size(Path.cwd())
    except ConfigError as error:
        return Finding("note", "upload", error.message)
    return Finding("ok", "upload", "this folder is small enough for a job to take along")


def _on_cluster(config: Any, storage: Any, needs: Any) -> int:
    from areal_ray.driver.connect import cluster, use_token
    from areal_ray.tools.doctor import node_findings

    use_token()
    with cluster(config, fast=False):
        return _print(node_findings(config, storage, needs))


def _print(findings: Iterable[Any]) -> int:
    """Print findings as they come; how many are bad."""
    bad = 0
    for finding in findings:
        print(f"{_SIGNS[finding.state]}  {finding.what:<22}  {finding.text}")
        bad += finding.state == "bad"
    return bad
