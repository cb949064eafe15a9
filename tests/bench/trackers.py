"""Steady state with every tracker on beside none, each on this machine: the two take turns, as in throughput.py."""

from __future__ import annotations

from . import arms, report
from .bounds import TRACKED
from .options import Options
from .throughput import measure

PLAIN, ALL = "areal_ray", "areal_ray-trackers"
ARMS = (PLAIN, ALL)


def run(options: Options) -> list[dict]:
    if len(arms.available(ARMS, options.only)) < len(ARMS):
        print(f"trackers compares {' with '.join(ARMS)}")
        return []
    rates: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(options.rounds):
        found, _ = measure(ARMS, arms.Task())
        for name in ARMS:
            rates[name] += found[name]
    return [report.show(TRACKED, "tokens/s", rates, PLAIN, report.HIGHER)]
