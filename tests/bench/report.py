"""Medians, spreads and ratios of interleaved measurements, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEFAULT_PATH = "/tmp/areal_ray_bench.json"
LOWER, HIGHER, NEITHER = "lower is better", "higher is better", ""


def machine() -> str:
    """The machine that a figure belongs to."""
    with open("/proc/cpuinfo") as info:
        names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = names[0] if names else platform.machine()
    return f"{os.cpu_count()} cores ({cpu}), {memory:.0f} GiB"


def revision() -> str | None:
    """Of the checkout, "-dirty" if files differ from it; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def context(**more: Any) -> dict[str, Any]:
    """What has to be known to judge a figure, or to repeat it."""
    versions = {}
    for name in ("torch", "ray", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    known = {"machine": machine(), "date": date.today().isoformat(), "revision": revision(), "versions": versions}
    return known | more


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratios(mine: Sequence[float], theirs: Sequence[float], paired: bool = True) -> list[float]:
    """Round by round; if not paired the one of the medians; none where it would be divided by nothing."""
    if paired:
        return [a / b for a, b in zip(mine, theirs, strict=True) if b]
    below = statistics.median(theirs)
    return [statistics.median(mine) / below] if below > 0 else []


def said(arm: str, text: str) -> None:
    """Print what one run of an arm gave, for whoever waits."""
    print(f"  {arm}: {text}", flush=True)


def show(
    title: str, unit: str, rows: dict[str, list[float]], reference: str, better: str = LOWER, paired: bool = True
) -> dict[str, Any]:
    """Print one measurement of several arms; each arm's ratio is the median of the ratios of paired rounds.

    Args:
        title: by which it is found again.
        unit: of the figures.
        rows: by arm, a figure for each round.
        reference: the arm that the others are compared with; the first one if it is not among them.
        better: LOWER, HIGHER or NEITHER.
        paired: no, for figures that may be nothing or less: then the ratio is that of the medians.
    """
    if reference not in rows:
        reference = next(iter(rows))
    result: dict[str, Any] = {}
    for arm, values in rows.items():
        result[arm] = {**spread(values), "values": values, "ratio": None}
        if found := ratios(values, rows[reference], paired):
            result[arm] |= {"ratio": statistics.median(found), "ratio_min": min(found), "ratio_max": max(found)}
    noise = [after / before for before, after in pairwise(rows[reference]) if before] if paired else []
    table = {"title": title, "unit": unit, "better": better, "reference": reference, "paired": paired}
    table |= {"arms": result, "noise": noise}
    print_table(table)
    return table


def figures(title: str, **values: float) -> dict[str, Any]:
    """Print some figures that belong together but compare nothing."""
    table = {"title": title, "figures": values}
    print_table(table)
    return table


def curves(title: str, arms: dict[str, list[tuple[float, int]]], marks: Sequence[float]) -> dict[str, Any]:
    """What arms have reached over time, to be drawn; `marks` are times at which something happened to all of them."""
    table = {"title": title, "curves": {arm: [list(point) for point in points] for arm, points in arms.items()}}
    print_table(table | {"marks": list(marks)})
    return table | {"marks": list(marks)}


def print_table(table: dict[str, Any]) -> None:
    """The last line is what no difference looks like: the reference against itself in the round before."""
    if "curves" in table:
        print(f"\n{table['title']}")
        for arm, points in table["curves"].items():
            print(f"  {arm:<28} {points[-1][1]:>10} in {points[-1][0]:.0f} s")
        return
    if "arms" not in table:
        print(f"\n{table['title']}")
        for name, value in table["figures"].items():
            print(f"  {name:<28} {value:>14.4f}")
        return
    reference, paired, noise = table["reference"], table["paired"], table["noise"]
    print(f"\n{table['title']} [{', '.join(filter(None, (table['unit'], table['better'])))}]")
    how = "(min to max)" if paired else "(of the medians)"
    print(f"  {'arm':<28} {'median':>10} {'min':>10} {'max':>10}   ratio to {reference} {how}")
    for arm, row in table["arms"].items():
        numbers = f"{row['median']:>10.4f} {row['min']:>10.4f} {row['max']:>10.4f}"
        if row["ratio"] is not None:
            numbers += f"   {row['ratio']:.3f}" + (f" ({row['ratio_min']:.3f} to {row['ratio_max']:.3f})" * paired)
        print(f"  {arm:<28} {numbers}")
    if noise:
        print(f"  noise: {reference} against itself, round by round: {min(noise):.3f} to {max(noise):.3f}")


def write(path: str, results: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Put the results into a file; those that it has of the same revision, under other titles, stay.

    Each carries its own context: of another call it may have been measured with other rounds, on another day.
    """
    mine = {result["title"]: {**result, "context": about} for result in results}
    try:
        with open(path) as file:
            before = json.load(file)
        if about["revision"] is not None and before["context"]["revision"] == about["revision"]:
            mine = {result["title"]: result for result in before["results"]} | mine
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or not one of these
        pass
    part = f"{path}.part"
    with open(part, "w") as file:
        json.dump({"context": about, "results": list(mine.values())}, file, indent=2)
    os.replace(part, path)
    print(f"\n{about['machine']}, {about['date']}\nJSON: {path}", flush=True)
