"""Tokens that count per second while workers are killed by the same Poisson schedule, mean 60 s.

The clock runs from the first finished step. A kill that finds no worker process, because the group is being started
again, finds nothing to kill, as on a real machine. What counts is the highest step that was reached, but not what is
computed twice.
"""

import random
import time

from . import arms, report
from .launch import Job, kill, tree
from .options import Options

ARMS = ("tutorial", "tutorial-async", "torchrun-dcp", "torchrun-async-thread-best", "areal_ray")
EVERY = 25  # steps between saves
MEAN_S = 60.0


def schedule(seed: int, seconds: float) -> list[tuple[float, int]]:
    """Times of kills, in seconds from the first step, and the rank that each hits."""
    draw, kills = random.Random(seed), []
    at = draw.expovariate(1 / MEAN_S)
    while at < seconds:
        kills.append((at, draw.randrange(2)))
        at += draw.expovariate(1 / MEAN_S)
    return kills


def workers(job: Job) -> list[int]:
    """The training processes that are there now, ready or not, by age."""
    if job.cluster is not None:
        found = [p for p in job.cluster.processes() if _title(p).startswith("ray::RayTrainWorker")]
    else:
        found = [p for p in tree(job.process.pid) if p.ppid() == job.process.pid]
    return [p.pid for p in sorted(found, key=lambda p: p.create_time())]


def _title(process) -> str:
    try:
        return (process.cmdline() or [""])[0]
    except Exception:  # noqa: BLE001  (it has ended meanwhile)
        return ""


def under_kills(job: Job, kills: list[tuple[float, int]], seconds: float) -> tuple[int, int]:
    """The highest step that the job has reached after so many seconds under these kills, and how many of them hit."""
    began, hit = job.wait(lambda: job.events("step"))[0]["time"], 0
    for at, rank in kills:
        time.sleep(max(0.0, began + at - time.time()))
        there = workers(job)
        if there:
            kill(there[rank % len(there)])
            hit += 1
    time.sleep(max(0.0, began + seconds - time.time()))
    assert job.process.poll() is None, job.printed()
    return max(line["step"] for line in job.events("step") if line["time"] <= began + seconds), hit


def run(options: Options) -> list[dict]:
    names = arms.available(ARMS, options.only)
    task = arms.Task(every=EVERY)
    rates: dict[str, list[float]] = {name: [] for name in names}
    hits: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        kills = schedule(number + 1, options.seconds)
        for name in options.order(names, number):
            with arms.started(name, task) as job:
                step, hit = under_kills(job, kills, options.seconds)
            rates[name].append(step * task.tokens / options.seconds)
            hits[name].append(hit)
            report.said(name, f"step {step}, {hit} of {len(kills)} kills hit")
    return [
        report.show(f"goodput under kills every {MEAN_S:.0f} s on average", "tokens/s", rates, "tutorial"),
        report.show("kills that hit", "kills", hits, "tutorial"),
    ]
