"""Steady-state tokens per second without saves, with the same threads and nice level.

Steady state begins some time after the first step: standbys, which are started beside the training, are warm by then.
"""

import statistics
from itertools import pairwise

from . import arms, report
from .launch import Job
from .options import Options

ARMS = ("torchrun", "tutorial", "hf-ddp", "areal_ray", "areal_ray-no-standbys")
WARM_UP_S, STEPS = 45.0, 100


def window(job: Job) -> list[float]:
    """The times of STEPS + 1 steps from the end of the warm-up on; waits for them."""

    def there() -> list[float]:
        times = [line["time"] for line in job.events("step")]
        steady = [at for at in times if at >= times[0] + WARM_UP_S]
        return steady[: STEPS + 1] if len(steady) > STEPS else []

    return job.wait(there, limit_s=600)


def run(options: Options) -> list[dict]:
    names = arms.available(ARMS, options.only)
    task = arms.Task()
    rates: dict[str, list[float]] = {name: [] for name in names}
    medians: dict[str, list[float]] = {name: [] for name in names}
    settings: dict[str, set] = {name: set() for name in names}
    for number in range(options.rounds):
        for name in options.order(names, number):
            with arms.started(name, task) as job:
                times = window(job)
                settings[name] |= {(line["threads"], line["nice"]) for line in job.events("start")}
            rates[name].append(task.tokens * STEPS / (times[-1] - times[0]))
            medians[name].append(statistics.median(b - a for a, b in pairwise(times)))
            report.said(name, f"{rates[name][-1]:.0f} tokens/s, median step {medians[name][-1]:.4f} s")
    assert len(set().union(*settings.values())) == 1, f"not the same threads and nice levels: {settings}"
    shown = [
        report.show("steady state, no saves", "tokens/s", rates, "torchrun"),
        report.show("median step time, no saves", "s", medians, "torchrun"),
    ]
    if {"areal_ray", "areal_ray-no-standbys"} <= set(names):
        both = {name: medians[name] for name in ("areal_ray-no-standbys", "areal_ray")}
        shown.append(report.show("median step time, standbys", "s", both, "areal_ray-no-standbys"))
    return shown
