"""SIGKILL of a worker to the next finished step, steps lost; for areal_ray SIGSTOP too.

Each round starts every arm in turn, waits for its first checkpoint, and kills at random phases: a rank drawn by lot,
some seconds drawn by lot after the last recovery. The draws are the same for every arm.
"""

import random
import signal
import statistics
import time
from typing import NamedTuple

from areal_ray.run import RunDir
from areal_ray.run.goodput import PHASES as NAMES
from areal_ray.run.goodput import goodput
from areal_ray.storage import LocalStorage

from . import arms, report
from .bounds import CODE_RUNS, KILLED, PHASES, STOPPED, STOPPED_ARM
from .launch import Job, kill
from .options import Options

ARMS = (
    "tutorial", "tutorial-async", "tutorial-best", "torchrun-dcp", "hf-ddp", "areal_ray", "areal_ray-no-standbys",
)  # fmt: skip
EVERY = 25  # steps between saves
PHASE_S = (8.0, 25.0)  # from the last recovery to the next kill
FIRST_S = 600.0  # until there is a checkpoint
KILLS = 2  # per round and arm
LIMIT_S = {signal.SIGKILL: 400.0, signal.SIGSTOP: 400.0}


class Restart(NamedTuple):
    """Args:
    seconds: from the signal to the next finished step.
    lost: finished steps that are computed again.
    code_s: of the seconds, until the new process of rank 0 was in its training code.
    """

    seconds: float
    lost: int
    code_s: float


def measure(job: Job, rank: int, phase_s: float, number: int = signal.SIGKILL) -> Restart:
    """Send a worker a signal some seconds from now, and wait for the next finished step."""
    time.sleep(phase_s)
    victim = job.wait(lambda: job.events("step", rank))[-1]
    at = kill(victim["pid"], number)
    # Rank 0 may have had a step's line under way; what it wrote up to now is what was finished.
    last = [line for line in job.events("step") if line["time"] <= at][-1]
    after = job.wait(lambda: job.step_after(last), LIMIT_S[number])
    done = max(line["step"] for line in job.events("step") if line["pid"] == last["pid"])
    began = [line["time"] for line in job.events("start") if at < line["time"] <= after["time"]]
    return Restart(after["time"] - at, done - after["step"] + 1, began[-1] - at)


def phases(job: Job) -> dict[str, list[float]]:
    """Of each restart of areal_ray after a kill, the seconds of its phases, as its ledger has them."""
    run = RunDir(LocalStorage(job.folder / "storage" / arms.NAME))
    again = [each for each in goodput(run)["attempts"] if each["after"].startswith("worker")]
    return {name: [each[name] for each in again if name in each] for name in NAMES}


def has_checkpoint(job: Job) -> bool:
    """Whether the first one has been there for a step at least (areal_ray writes it while it trains)."""
    steps = job.events("step")
    return bool(steps) and steps[-1]["step"] > EVERY + 5


def run(options: Options) -> list[dict]:
    names = arms.available(ARMS, options.only)
    task = arms.Task(every=EVERY, overrides=options.model)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    lost: dict[str, list[float]] = {name: [] for name in names}
    code: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, list[float]] = {name: [] for name in NAMES}
    stopped: list[float] = []
    for number in range(options.rounds):
        for name in options.order(names, number):
            draw = random.Random(number)
            with arms.started(name, task) as job:
                job.wait(lambda job=job: has_checkpoint(job), FIRST_S)
                for _ in range(KILLS):
                    found = measure(job, draw.randrange(task.workers), draw.uniform(*PHASE_S))
                    seconds[name].append(found.seconds)
                    lost[name].append(found.lost)
                    code[name].append(found.code_s)
                    report.said(name, f"{found.seconds:.2f} s, {found.lost} steps lost")
                if name == "areal_ray":
                    for phase, values in phases(job).items():
                        parts[phase] += values
                if name == "areal_ray" and arms.has_watchdog():
                    stopped.append(measure(job, draw.randrange(task.workers), PHASE_S[1], signal.SIGSTOP).seconds)
    shown = [report.show(KILLED, "s", seconds, "tutorial")]
    shown.append(report.show("steps lost with a SIGKILL", "steps", lost, "tutorial", paired=False))
    shown.append(report.show(CODE_RUNS, "s", code, "tutorial"))
    if any(parts.values()):
        medians = {name: statistics.median(values) for name, values in parts.items() if values}
        shown.append(report.figures(PHASES, **medians))
    if stopped:
        shown.append(report.show(STOPPED, "s", {STOPPED_ARM: stopped}, STOPPED_ARM))
    return shown
