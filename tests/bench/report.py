"""Medians, spreads and ratios of interleaved measurements, as a table and as JSON."""

import json
import os
import platform
import statistics
from datetime import date
from itertools import pairwise


def machine() -> str:
    """The machine that a figure belongs to."""
    with open("/proc/cpuinfo") as info:
        names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = names[0] if names else platform.machine()
    return f"{os.cpu_count()} cores ({cpu}), {memory:.0f} GiB, {date.today().isoformat()}"


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def said(arm: str, text: str) -> None:
    """Print what one run of an arm gave, for whoever waits."""
    print(f"  {arm}: {text}", flush=True)


def show(title: str, unit: str, rows: dict[str, list[float]], reference: str) -> dict:
    """Print one measurement of several arms; each arm's ratio is the median of the ratios of paired rounds.

    The last line is what no difference looks like: the reference against itself in the round before.
    """
    print(f"\n{title} [{unit}]")
    if reference not in rows:
        reference = next(iter(rows))
    print(f"  {'arm':<28} {'median':>10} {'min':>10} {'max':>10}   ratio to {reference} (min to max)")
    result = {}
    for arm, values in rows.items():
        row = spread(values)
        result[arm] = {**row, "values": values}
        numbers = f"{row['median']:>10.4f} {row['min']:>10.4f} {row['max']:>10.4f}"
        pairs = [mine / theirs for mine, theirs in zip(values, rows[reference], strict=True) if theirs]
        if pairs:  # none of 0
            result[arm] |= {"ratio": statistics.median(pairs), "ratio_min": min(pairs), "ratio_max": max(pairs)}
            numbers += f"   {statistics.median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f})"
        print(f"  {arm:<28} {numbers}")
    noise = [after / before for before, after in pairwise(rows[reference]) if before]
    if noise:
        print(f"  noise: {reference} against itself, round by round: {min(noise):.3f} to {max(noise):.3f}")
    return {"title": title, "unit": unit, "reference": reference, "arms": result, "noise": noise}


def write(path: str, results: list[dict]) -> None:
    with open(path, "w") as file:
        json.dump({"machine": machine(), "results": results}, file, indent=2)
    print(f"\n{machine()}\nJSON: {path}")
