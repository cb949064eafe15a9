"""areal-ray runs, watch, compare, report: the commands about runs and their output."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

_DEFAULT_ROOT = "~/areal_ray"


def add_runs(commands: Any) -> None:
    """Add the commands to those of `areal-ray`."""
    for name, run, text in (
        ("runs", _runs, "the runs in a folder: state, step, loss, restarts, age, size"),
        ("watch", _watch, "follow a run from elsewhere, as it logs its steps"),
        ("compare", _compare, "runs side by side: what differs in configuration and results"),
        ("report", _report, "write one HTML file with curves, restarts, checkpoints, failures and configuration"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        if run is _runs:
            command.add_argument("path", metavar="PATH", nargs="?", default=_DEFAULT_ROOT, help="default ~/areal_ray")
        elif run is _compare:
            text = "two run directories or more, or the folder of a sweep for all of its trials"
            command.add_argument("run_dirs", metavar="RUN", nargs="+", help=text)
        elif run is _report:
            command.add_argument("run_dirs", metavar="RUN", nargs="+", help="a run directory; several are overlaid")
            command.add_argument("--out", metavar="FILE", help="default report.html in the (first) run directory")
        else:
            command.add_argument("run_dir", metavar="RUN")
        if run is not _report:
            command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=lambda arguments, run=run: _tell(run, arguments))


def _tell(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    try:
        return run(arguments)
    except (ValueError, OSError) as error:
        print(f"areal-ray: {error}", file=sys.stderr)
        return 1


def _runs(arguments: argparse.Namespace) -> int:
    from areal_ray.run.units import size_text, span_text
    from areal_ray.storage import storage_at
    from areal_ray.tools.runs import list_runs

    root = storage_at(arguments.path)
    rows = list_runs(root)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    if not rows:
        print(f"no runs in {root.location}")
        return 0
    heads = ["name", "state", "step", "loss", "held-out", "restarts", "last seen", "checkpoints"]
    table = [
        [
            row.name,
            row.status,
            f"{row.step:,}" + (f" of {row.steps:,}" if row.steps else ""),
            _loss(row.loss),
            _loss(row.held_out_loss),
            str(row.restarts),
            "-" if row.age_s is None else f"{span_text(row.age_s)} ago",
            size_text(row.bytes),
        ]
        for row in rows
    ]
    print(aligned([heads, *table], left=2))
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from areal_ray.run import RunDir
    from areal_ray.storage import storage_at
    from areal_ray.tools.report.course import read_config
    from areal_ray.tools.runs import follow, run_row
    from areal_ray.train.sinks import Console

    run = RunDir(storage_at(arguments.run_dir))
    if not run.exists():
        raise ValueError(f"{run.storage.location}: there is no run")
    config, _ = read_config(run)
    console = Console(lambda text: print(text, flush=True), config.get("train", {}).get("steps") or 0)
    try:
        for line in follow(run):
            if arguments.json:
                print(json.dumps(line), flush=True)
            else:
                console.log(line["step"], {name: value for name, value in line.items() if name != "step"})
    except KeyboardInterrupt:
        return 130
    if not arguments.json:
        row = run_row(run)
        print(f"{row.name}: {row.status} at step {row.step}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from areal_ray.run import RunDir
    from areal_ray.storage import storage_at
    from areal_ray.tools.report import read_course
    from areal_ray.tools.runs import compare
    from areal_ray.tools.sweep.record import runs_of

    places = [storage_at(path) for path in arguments.run_dirs]
    if len(places) == 1:  # a sweep is a folder beside its runs
        beside = storage_at(places[0].location.rstrip("/").rpartition("/")[0])
        trials = [beside.sub(run) for run in runs_of(places[0])]
        if not (places := [trial for trial in trials if trial.names()]):  # the others have not begun
            raise ValueError(f"no trial of {arguments.run_dirs[0]} has begun")
    courses = [read_course(RunDir(place)) for place in places]
    rows = compare(*courses)
    if arguments.json:
        names = ["a", "b"] if len(courses) == 2 else [course.name for course in courses]
        names = names if len(set(names)) == len(names) else [place.location for place in places]
        print(json.dumps([{"key": key, **dict(zip(names, values, strict=True))} for key, *values in rows], indent=2))
        return 0
    heads = ["", *(course.name for course in courses)]
    print(aligned([heads, *([key, *map(_value, values)] for key, *values in rows)], left=len(heads)))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from areal_ray.run import RunDir
    from areal_ray.storage import storage_at
    from areal_ray.tools.report import page, read_course

    runs = [RunDir(storage_at(path)) for path in arguments.run_dirs]
    text = page([read_course(run) for run in runs])
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            file.write(text)
    else:
        runs[0].write_report(text)
    print(arguments.out or f"{runs[0].storage.location}/report.html")
    return 0


def aligned(rows: list[list[str]], left: int) -> str:
    """A table; the first `left` columns begin at the same place, the others end there."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        return "  ".join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in cells).rstrip()

    return "\n".join(map(line, rows))


def _value(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
