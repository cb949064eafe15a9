"""Tokens that count per second while workers are killed by the same Poisson schedule, mean 60 s.

The clock runs from the first finished step. A kill that finds no worker process, because the group is being started
again, finds nothing to kill, as on a real machine. What counts is the highest step that was reached, but not what is
computed twice. A job that gives up keeps what it has reached, and its clock runs on.
"""

import random
import subprocess
import time
from contextlib import suppress

import psutil

from . import arms, report
from .bounds import GOODPUT
from .launch import Job, kill, title
from .options import Options

ARMS = (
    "tutorial", "tutorial-async", "tutorial-best", "torchrun-dcp", "torchrun-async-thread-best", "hf-ddp", "areal_ray",
)  # fmt: skip
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
    found: list[psutil.Process] = []
    if job.cluster is not None:
        found = [p for p in job.processes() if title(p).startswith("ray::RayTrainWorker")]
    else:
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(job.process.pid).children()
    return [p.pid for p in sorted(found, key=lambda p: p.create_time())]


def ended(job: Job, until: float) -> bool:
    """Wait until that time; whether the job has ended by itself."""
    with suppress(subprocess.TimeoutExpired):
        job.process.wait(max(0.0, until - time.time()))
    return job.process.poll() is not None


def under_kills(job: Job, kills: list[tuple[float, int]], seconds: float) -> tuple[int, int, bool]:
    """The highest step after so many seconds under these kills, how many of them hit, whether it was over before."""
    began, hit = job.wait(lambda: job.events("step"))[0]["time"], 0
    for at, rank in kills:
        if ended(job, began + at):
            break
        if there := workers(job):
            with suppress(ProcessLookupError):
                kill(there[rank % len(there)])
                hit += 1
    over = ended(job, began + seconds)
    return max(line["step"] for line in job.events("step") if line["time"] <= began + seconds), hit, over


def run(options: Options) -> list[dict]:
    names = arms.available(ARMS, options.only)
    task = arms.Task(every=EVERY)
    steps: dict[str, list[int]] = {name: [] for name in names}
    hits: dict[str, list[float]] = {name: [] for name in names}
    gone: dict[str, list[float]] = {name: [0] for name in names}
    for number in range(options.rounds):
        kills = schedule(number + 1, options.seconds)
        for name in options.order(names, number):
            with arms.started(name, task) as job:
                step, hit, over = under_kills(job, kills, options.seconds)
                why = f"; over before its time:\n{job.printed()[-1000:]}" if over else ""
            steps[name].append(step)
            hits[name].append(hit)
            gone[name][0] += over
            report.said(name, f"step {step}, {hit} of {len(kills)} kills hit{why}")
    rates = {name: [step * task.tokens / options.seconds for step in values] for name, values in steps.items()}
    totals = {name: [float(sum(values))] for name, values in steps.items()}
    print(f"\nkills every {MEAN_S:.0f} s on average, runs of {options.seconds:.0f} s")
    return [
        report.show(GOODPUT, "tokens/s", rates, "tutorial", report.HIGHER),
        report.show("goodput under kills, all rounds together", "steps", totals, "tutorial", report.HIGHER),
        report.show("kills that hit", "kills", hits, "tutorial", report.NEITHER),
        report.show("runs that were over before their time", f"of {options.rounds} runs", gone, "tutorial"),
    ]
