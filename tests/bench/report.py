"""Medians, spreads and ratios of interleaved measurements, as a table and as JSON."""

import json
import os
import platform
import statistics
from datetime import date


def machine() -> str:
    """The machine that a figure belongs to."""
    with open("/proc/cpuinfo") as info:
        names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = names[0] if names else platform.machine()
    return f"{os.cpu_count()} cores ({cpu}), {memory:.0f} GiB, {date.today().isoformat()}"


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def show(title: str, unit: str, rows: dict[str, list[float]], reference: str) -> dict:
    """Print one measurement of several arms; each arm's ratio is the median of the ratios of paired rounds."""
    print(f"\n{title} [{unit}]")
    print(f"  {'arm':<28} {'median':>10} {'min':>10} {'max':>10}   ratio to {reference}")
    result = {}
    for arm, values in rows.items():
        pairs = zip(values, rows[reference], strict=True)
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        row = spread(values) | {"ratio": ratio}
        result[arm] = row
        print(f"  {arm:<28} {row['median']:>10.4f} {row['min']:>10.4f} {row['max']:>10.4f}   {ratio:.3f}")
    return {"title": title, "unit": unit, "reference": reference, "arms": result}


def write(path: str, results: list[dict]) -> None:
    with open(path, "w") as file:
        json.dump({"machine": machine(), "results": results}, file, indent=2)
    print(f"\n{machine()}\nJSON: {path}")
