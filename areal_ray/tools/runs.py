"""Runs seen from outside: lists, following one, two side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from areal_ray.run import RunDir
from areal_ray.run.directory import CONFIG
from areal_ray.storage import Storage
from areal_ray.tools.report.course import ENDS, Course, flat, last_step, read_config, status, stored


@dataclass(frozen=True)
class RunRow:
    """One run in a list.

    Args:
        name: of its directory.
        status: as in `Course`.
        step, steps: at which it has ended, else the last that was logged; and the length of the run.
        loss, held_out_loss: the newest that are known.
        restarts: starts of the workers beyond one a submission.
        age_s: since its last sign of life.
        bytes: of its checkpoints.
    """

    name: str
    status: str
    step: int
    steps: int | None
    loss: float | None
    held_out_loss: float | None
    restarts: int
    age_s: float | None
    bytes: int


def list_runs(root: Storage) -> list[RunRow]:
    """The runs in a directory, and itself if it is one, by the time of their last sign of life, the newest last.

    Costs a look at the end of each run's metrics, and one through its ledger.
    """
    places = [root, *(root.sub(name) for name in root.directories(""))]
    found = [place for place in places if _is_run(place)]
    return sorted((run_row(RunDir(run)) for run in found), key=lambda row: -(row.age_s or 0.0))


def _is_run(storage: Storage) -> bool:
    return storage.size(CONFIG) is not None


def run_row(run: RunDir) -> RunRow:
    """The row of one run."""
    config, _ = read_config(run)
    events = run.events_of("submitted", "attempt", "training", "saved", "deleted", "failure", *ENDS)
    metrics = run.last_metrics()
    submitted = sum(event["event"] == "submitted" for event in events)
    attempts = sum(event["event"] == "attempt" for event in events)
    times = [event["time"] for event in events[-1:]] + [line["time"] for line in metrics[-1:] if "time" in line]
    return RunRow(
        name=run.storage.location.rstrip("/").rpartition("/")[2],
        status=status(run, events),
        step=last_step(events, metrics),
        steps=config.get("train", {}).get("steps"),
        loss=_newest(metrics, "loss"),
        held_out_loss=_newest(metrics, "held_out_loss"),
        restarts=max(0, attempts - submitted),
        age_s=max(0.0, time.time() - max(times)) if times else None,
        bytes=sum(stored(events).values()),
    )


def _newest(metrics: list[dict[str, Any]], name: str) -> float | None:
    values = [line[name] for line in metrics if isinstance(line.get(name), (int, float))]
    return values[-1] if values else None


def follow(run: RunDir, wait_s: float = 2.0) -> Iterator[dict[str, Any]]:
    """The last logged steps of a run, and those that come, until it ends or nobody works on it any more."""
    seen = -1
    while True:
        # Asked before: what it logs until it has ended is shown, too.
        running = status(run, run.events_of("submitted", *ENDS)) == "running"
        for line in run.last_metrics():
            if line["step"] > seen:
                yield line
                seen = line["step"]
        if not running:
            return
        time.sleep(wait_s)


def compare(*runs: Course) -> list[tuple[Any, ...]]:
    """What differs between runs: (key, of the first, of the second, ...), the configuration first, then results."""
    configs = [flat(run.config) for run in runs]
    rows: list[tuple[Any, ...]] = [
        (key, *(config.get(key) for config in configs))
        for key in sorted(set().union(*configs))
        if not key.startswith("run.storage_path")
    ]
    rows += [("status", *(run.status for run in runs)), ("step", *(run.step for run in runs))]
    names = sorted({name for run in runs for line in run.metrics for name in line} - {"step", "time"})
    rows += [(name, *(run.last(name) for run in runs)) for name in names]
    rows += [(name, *(run.account[name] for run in runs)) for name in ("wall_s", "share", "lost_steps")]
    return [row for row in rows if not all(_same(row[1], value) for value in row[2:])]


def _same(a: Any, b: Any) -> bool:
    numbers = isinstance(a, float) and isinstance(b, float)
    return a == b or (numbers and math.isnan(a) and math.isnan(b))
