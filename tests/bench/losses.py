"""Tokens that count per second while workers and whole nodes are lost, mean 60 s, beside the same without any loss.

Half of the losses are a worker, half the node on which it runs, with all processes there and the copies in memory that
they keep. There are three nodes for one worker each, so that one is in reserve, and a lost one is replaced at once; the
run has two workers and partners. They take turns as in goodput.py, whose clocks and counts these are.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from . import arms, report
from .bounds import LOSSES
from .goodput import EVERY, MEAN_S, Run, schedule, take_turns, workers
from .launch import Cluster
from .options import Options

PARTNERS = "areal_ray-partners"
ARMS = ("areal_ray", PARTNERS)
_WORKERS, _NODES = 2, 3


class Losses(Run):
    """A run under losses: targets 0 and 1 are the workers, 2 and 3 their nodes."""

    def kill(self, target: int) -> float | None:
        there = workers(self.job)
        if target < _WORKERS or not there:
            return super().kill(target)
        at = time.time()
        self.job.cluster.replace_node(there[target % len(there)])
        self.hit += 1
        return at


def beside_undisturbed(seed: int, seconds: float) -> dict[str, Run]:
    """Both arms until their clocks have run down; the one that loses nothing first."""
    losses = schedule(seed, seconds, 2 * _WORKERS)
    task = arms.Task(every=EVERY, workers=_WORKERS)
    with ExitStack() as stack:
        quiet = Run(stack.enter_context(arms.started("areal_ray", task)), [], seconds)
        cluster = stack.enter_context(Cluster(0, *[1] * _NODES))
        job = stack.enter_context(arms.started(PARTNERS, task, cluster.address))
        job.cluster = cluster
        lossy = Losses(job, losses, seconds)
        take_turns([quiet, lossy])
        why = f"; over before its time:\n{job.printed()[-1000:]}" if lossy.over else ""
        report.said("areal_ray", f"{quiet.steps} steps")
        report.said(PARTNERS, f"{lossy.steps} steps, {lossy.hit} of {len(losses)} losses hit{why}")
    return {"areal_ray": quiet, PARTNERS: lossy}


def run(options: Options) -> list[dict]:
    if len(arms.available(ARMS, options.only)) < len(ARMS):
        print(f"losses compares {' with '.join(ARMS)}")
        return []
    found = [beside_undisturbed(number + 1, options.seconds) for number in range(options.rounds)]
    print(f"\nlosses every {MEAN_S:.0f} s on average, runs of {options.seconds:.0f} s")
    tokens = arms.Task(workers=_WORKERS).tokens
    rates = {name: [each[name].steps * tokens / options.seconds for each in found] for name in ARMS}
    totals = {name: [float(sum(each[name].steps for each in found))] for name in ARMS}
    hits = {PARTNERS: [float(each[PARTNERS].hit) for each in found]}
    return [
        report.show(LOSSES, "tokens/s", rates, "areal_ray", report.HIGHER),
        report.show(f"{LOSSES}, all rounds together", "steps", totals, "areal_ray", report.HIGHER),
        report.show(f"{LOSSES}: losses that hit", "losses", hits, PARTNERS, report.NEITHER),
    ]
