"""Steady-state tokens per second without saves, with the same threads and nice level.

Steady state begins some time after the first step, and for areal_ray not before its standbys, which are started beside
the training, are there and warm.
"""

import statistics
import time
from itertools import pairwise

from . import arms, report
from .bounds import STANDBYS, STEADY
from .launch import Job
from .options import Options

ARMS = ("torchrun", "tutorial", "tutorial-best", "hf-ddp", "areal_ray", "areal_ray-no-standbys")
WARM_UP_S, STEPS = 45.0, 100
STANDBYS_S = 180.0
LOOK_S = 1.0  # reading a log of some thousand lines takes time from those who are measured


def window(job: Job, standbys: bool) -> list[float]:
    """The times of STEPS + 1 steps from the end of the warm-up on; waits for them."""
    began = job.wait(lambda: job.events("step"))[0]["time"]
    if standbys:
        job.wait(lambda: arms.standbys_ready(job), STANDBYS_S, LOOK_S, what="no two warm standbys")
    begins = max(time.time(), began + WARM_UP_S)
    time.sleep(max(0.0, begins - time.time()))

    def there() -> list[float]:
        steady = [line["time"] for line in job.events("step") if line["time"] >= begins]
        return steady[: STEPS + 1] if len(steady) > STEPS else []

    return job.wait(there, 600, LOOK_S)


def settings(job: Job) -> set[tuple[int, int]]:
    """Threads and nice levels that its ranks train with."""
    return {(line["threads"], line["nice"]) for rank in range(2) for line in job.events("settings", rank)}


def run(options: Options) -> list[dict]:
    names = arms.available(ARMS, options.only)
    task = arms.Task()
    rates: dict[str, list[float]] = {name: [] for name in names}
    medians: dict[str, list[float]] = {name: [] for name in names}
    same: set[tuple[int, int]] = set()
    for number in range(options.rounds):
        for name in options.order(names, number):
            with arms.started(name, task) as job:
                times = window(job, standbys=name == "areal_ray" and arms.has_standbys())
                same = same or settings(job)
                assert len(same) == 1, f"{name}: not one number of threads and nice level: {same}"
                assert settings(job) == same, f"{name}: other threads or nice level: {settings(job)}, not {same}"
            rates[name].append(task.tokens * STEPS / (times[-1] - times[0]))
            medians[name].append(statistics.median(b - a for a, b in pairwise(times)))
            report.said(name, f"{rates[name][-1]:.0f} tokens/s, median step {medians[name][-1]:.4f} s, {same}")
    shown = [
        report.show(STEADY, "tokens/s", rates, "torchrun", report.HIGHER),
        report.show("median step time, no saves", "s", medians, "torchrun"),
    ]
    if {"areal_ray", "areal_ray-no-standbys"} <= set(names):
        both = {name: medians[name] for name in ("areal_ray-no-standbys", "areal_ray")}
        shown.append(report.show(STANDBYS, "s", both, "areal_ray-no-standbys"))
    return shown
