"""Tokens that count per second while workers are killed by the same Poisson schedule, mean 60 s.

Every arm runs beside areal_ray and they take turns: while one runs, every process of the other is stopped, so that a
machine which is slower now than some minutes ago does not pass for a difference. Each has a clock that runs in its own
turns only, from the first finished step on, without the beginning of a turn, in which whatever fell due in the other's
turn is done. By that clock the kills come. A kill that finds no worker process, because the group is being started
again, finds nothing to kill, as on a real machine. A turn in which workers were killed lasts until they train again, if
that is not too long for those who wait.

All save equally often, if not asked otherwise (--saves): who pays less for a save would save more often (Young, "A
First Order Approximation to the Optimum Checkpoint Interval", 1974).

What counts is the highest step that was reached, but not what is computed twice. A job that gives up keeps what it has
reached, and its clock runs on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress

import psutil

from . import arms, report
from .bounds import goodput_beside, steps_over_time
from .launch import Job, kill, title
from .options import Options

OURS = "areal_ray"
ARMS = (
    "tutorial", "tutorial-async", "tutorial-best", "torchrun-dcp", "torchrun-async-thread-best", "hf-ddp", OURS,
)  # fmt: skip
EVERY = 25  # steps between saves, if nothing else is said
MEAN_S = 60.0
SETTLE_S, TURN_S = 1.0, 8.0
LONGEST_S = 16.0  # of a turn; who is stopped for longer may be taken for dead
AGAIN_S = 1.0  # of training after a restart, before the turn may end
LOOK_S = 0.1  # reading a log takes time from those who are measured


def schedule(seed: int, seconds: float, targets: int = 2) -> list[tuple[float, int]]:
    """Times of kills, in seconds from the first step, and which of so many targets (ranks) each hits."""
    draw, kills = random.Random(seed), []
    at = draw.expovariate(1 / MEAN_S)
    while at < seconds:
        kills.append((at, draw.randrange(targets)))
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


class Run:
    """One arm under kills.

    Args:
        job: that trains.
        kills: by its own clock.
        seconds: at which that ends.

    Attributes:
        used: what its clock says.
        hit: how many kills found somebody.
        curve: (seconds by its clock, steps that count by then), at most one a second.
        over: whether it has ended by itself.
    """

    def __init__(self, job: Job, kills: Sequence[tuple[float, int]], seconds: float) -> None:
        self.job, self._kills, self._seconds = job, list(kills), seconds
        self.used, self.hit, self.over = 0.0, 0, False
        self.curve: list[tuple[float, int]] = [(0.0, 0)]
        self._aside = self._made = self._highest = 0  # steps: made while the clock stood; made; reached

    @property
    def done(self) -> bool:
        return self.over or self.used >= self._seconds

    @property
    def steps(self) -> int:
        """That count: those that were reached, but for as many as were made while the clock stood."""
        return self._highest - self._aside

    def turn(self) -> None:
        """Train for a while, and be killed if it is time."""
        time.sleep(SETTLE_S)
        before = len(self.job.events("step"))
        self._aside += before - self._made
        began, so_far, killed = time.time(), self.used, None
        while not self.done:
            time.sleep(LOOK_S)
            now = time.time()
            self.used = min(so_far + now - began, self._seconds)
            self.over = self.job.process.poll() is not None
            if self._kills and self.used >= self._kills[0][0]:
                killed = self.kill(self._kills.pop(0)[1]) or killed
            elif now - began > LONGEST_S or (now - began > TURN_S and self._trains(killed, now)):
                break
        lines = self.job.events("step")
        made = [line["step"] for line in lines]
        highest = max(made[:before])
        for line in lines[before:]:
            highest = max(highest, line["step"])
            self._reach(so_far + line["time"] - began, highest - self._aside)
        self._made, self._highest = len(made), max(made)

    def _reach(self, at: float, steps: int) -> None:
        """Put a point on the curve, in the place of the one before if that is less than a second old."""
        at = min(max(at, 0.0), self.used)
        if len(self.curve) > 1 and int(self.curve[-1][0]) == int(at):
            self.curve.pop()
        self.curve.append((round(at, 2), steps))

    def kill(self, target: int) -> float | None:
        """Hit a target; when, if there was anybody."""
        if there := workers(self.job):
            with suppress(ProcessLookupError):
                at = kill(there[target % len(there)])
                self.hit += 1
                return at
        return None

    def _trains(self, killed: float | None, now: float) -> bool:
        """Whether it does so since a while, if it was killed in this turn."""
        if killed is None:
            return True
        lines = self.job.events("step")
        pids = {line["pid"] for line in lines if line["time"] <= killed}
        again = [line["time"] for line in lines if line["pid"] not in pids]
        return bool(again) and now - again[0] > AGAIN_S


def take_turns(runs: Sequence[Run]) -> None:
    """Two runs, from their first steps until their clocks have run down."""
    for run in runs:
        run.job.wait(lambda job=run.job: job.events("step"))
    while not all(run.done for run in runs):
        for run, other in zip(runs, reversed(runs), strict=True):
            if not run.done:
                with other.job.frozen() if other.job.process.poll() is None else nullcontext():
                    run.turn()


def compete(tasks: Mapping[str, arms.Task], seed: int, seconds: float) -> dict[str, Run]:
    """The two arms until their clocks have run down."""
    kills = schedule(seed, seconds)
    with ExitStack() as stack:
        jobs = [stack.enter_context(arms.started(name, task)) for name, task in tasks.items()]
        runs = [Run(job, kills, seconds) for job in jobs]
        take_turns(runs)
        for name, run, job in zip(tasks, runs, jobs, strict=True):
            why = f"; over before its time:\n{job.printed()[-1000:]}" if run.over else ""
            report.said(name, f"{run.steps} steps, {run.hit} of {len(kills)} kills hit{why}")
    return dict(zip(tasks, runs, strict=True))


def saving(saves: Mapping[str, int], peer: str) -> str:
    """What a title says of how often the two save; nothing where it is as for all."""
    if {peer, OURS}.isdisjoint(saves):
        return ""
    return f", saves every {saves.get(peer, EVERY)} and (areal_ray) {saves.get(OURS, EVERY)} steps"


def run(options: Options) -> list[dict]:
    names = arms.available(ARMS, options.only)
    peers = [name for name in names if name != OURS]
    if OURS not in names or not peers:
        print(f"goodput compares {OURS} with another arm")
        return []
    tasks = {name: arms.Task(every=options.saves.get(name, EVERY)) for name in names}
    found: dict[str, list[dict[str, Run]]] = {peer: [] for peer in peers}
    for number in range(options.rounds):
        for peer in options.order(peers, number):
            found[peer].append(compete({name: tasks[name] for name in (peer, OURS)}, number + 1, options.seconds))
    print(f"\nkills every {MEAN_S:.0f} s on average, runs of {options.seconds:.0f} s")
    shown = []
    for peer in peers:
        runs = {name: [each[name] for each in found[peer]] for name in (peer, OURS)}
        rates = {name: [each.steps * tasks[name].tokens / options.seconds for each in runs[name]] for name in runs}
        totals = {name: [float(sum(each.steps for each in runs[name]))] for name in runs}
        hits = {name: [float(each.hit) for each in runs[name]] for name in runs}
        gone = {name: [float(sum(each.over for each in runs[name]))] for name in runs}
        beside = goodput_beside(peer) + saving(options.saves, peer)
        marks = [at for at, _ in schedule(1, options.seconds)]
        shown += [
            report.show(beside, "tokens/s", rates, peer, report.HIGHER),
            report.show(f"{beside}, all rounds together", "steps", totals, peer, report.HIGHER),
            report.show(f"{beside}: kills that hit", "kills", hits, peer, report.NEITHER),
            report.show(f"{beside}: runs that were over before their time", f"of {options.rounds} runs", gone, peer),
            report.curves(steps_over_time(beside), {name: runs[name][0].curve for name in runs}, marks),
        ]
    return shown
