"""The results of `make bench` as Markdown tables, for the README: `python -m tests.bench.markdown [FILE]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from .report import DEFAULT_PATH

Result = Mapping[str, Any]


def number(value: float) -> str:
    """Three digits that count, and whole numbers from a hundred on."""
    digits = next((digits for limit, digits in ((100, 0), (10, 1), (1, 2)) if abs(value) >= limit), 3)
    return f"{value:,.{digits}f}"


def where(result: Result) -> str:
    """The machine, the versions and the day of a measurement."""
    about = result["context"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['machine']}; {versions}; {about['date']}"


def lines(result: Result) -> Iterator[str]:
    """A line for each arm: what, arm, median with its spread, how many, ratio to the reference, whose own is 1."""
    if "curves" in result:
        return  # see pictures
    if "arms" not in result:
        for name, value in result["figures"].items():
            yield f"| {result['title']} | {name} | {number(value)} | | |"
        return
    what = f"{result['title']} ({', '.join(filter(None, (result['unit'], result['better'])))})"
    for arm, row in result["arms"].items():
        figure = number(row["median"])
        if row["n"] > 1:
            figure += f" ({number(row['min'])} to {number(row['max'])})"
        ratio = "1" if arm == result["reference"] else ""
        if row["ratio"] is not None and not ratio:
            ratio = f"{row['ratio']:.3f}"
            if result["paired"] and row["n"] > 1:
                ratio += f" ({row['ratio_min']:.3f} to {row['ratio_max']:.3f})"
        yield f"| {what} | {arm} | {figure} | {row['n']} | {ratio} |"
        what = ""
    if result["noise"]:
        low, high = (f"{value:.3f}" for value in (min(result["noise"]), max(result["noise"])))
        yield f"| | {result['reference']} against itself | | | {low} to {high} |"


def tables(results: Sequence[Result]) -> str:
    """One table for each machine and day, in the order of the results."""
    found = []
    for about, group in groupby(results, where):
        head = ["| measured | arm | median (min to max) | n | ratio (min to max) |", "|---|---|---|---|---|"]
        found.append("\n".join([about, "", *head, *(line for result in group for line in lines(result))]))
    return "\n\n".join(found)


if __name__ == "__main__":
    with open(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_PATH) as file:
        print(tables(json.load(file)["results"]))
