"""SIGKILL of a worker to the next finished step, steps lost; for areal_ray SIGSTOP too.

Each round starts every arm in turn, waits for its first checkpoint, and kills at random phases: a rank drawn by lot,
some seconds drawn by lot after the last recovery. The draws are the same for every arm.
"""

import random
import signal
import time

from . import arms, report
from .bounds import KILLED, STOPPED, STOPPED_ARM
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


def measure(job: Job, rank: int, phase_s: float, number: int = signal.SIGKILL) -> tuple[float, int]:
    """Seconds from the signal to the next finished step, and how many finished steps are computed again."""
    time.sleep(phase_s)
    victim = job.wait(lambda: job.events("step", rank))[-1]
    at = kill(victim["pid"], number)
    # Rank 0 may have had a step's line under way; what it wrote up to now is what was finished.
    last = [line for line in job.events("step") if line["time"] <= at][-1]
    after = job.wait(lambda: job.step_after(last), LIMIT_S[number])
    done = max(line["step"] for line in job.events("step") if line["pid"] == last["pid"])
    return after["time"] - at, done - after["step"] + 1


def has_checkpoint(job: Job) -> bool:
    """Whether the first one has been there for a step at least (areal_ray writes it while it trains)."""
    steps = job.events("step")
    return bool(steps) and steps[-1]["step"] > EVERY + 5


def run(options: Options) -> list[dict]:
    names = arms.available(ARMS, options.only)
    task = arms.Task(every=EVERY, overrides=options.model)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    lost: dict[str, list[float]] = {name: [] for name in names}
    stopped: list[float] = []
    for number in range(options.rounds):
        for name in options.order(names, number):
            draw = random.Random(number)
            with arms.started(name, task) as job:
                job.wait(lambda job=job: has_checkpoint(job), FIRST_S)
                for _ in range(KILLS):
                    took, again = measure(job, draw.randrange(task.workers), draw.uniform(*PHASE_S))
                    seconds[name].append(took)
                    lost[name].append(again)
                    report.said(name, f"{took:.2f} s, {again} steps lost")
                if name == "areal_ray" and arms.has_watchdog():
                    stopped.append(measure(job, draw.randrange(task.workers), PHASE_S[1], signal.SIGSTOP)[0])
    shown = [report.show(KILLED, "s", seconds, "tutorial")]
    shown.append(report.show("steps lost with a SIGKILL", "steps", lost, "tutorial", paired=False))
    if stopped:
        shown.append(report.show(STOPPED, "s", {STOPPED_ARM: stopped}, STOPPED_ARM))
    return shown
