"""Steady-state tokens per second without saves, with the same threads and nice level.

Two arms at a time run on the machine, each with whatever belongs to it, and take turns: while one is measured every
process of the other is stopped. Seconds lie between what is compared, so that a machine which is slower now than a
minute ago, or one run's luck with its memory, does not pass for a difference. Each turn begins with some time that is
not counted, in which whatever fell due in the other's turn is done, and is long beside it, so that what happens every
few seconds is in it.

Steady state begins some time after the first step, and for areal_ray not before its standbys, which are started beside
the training, are there and warm.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise

from . import arms, report
from .bounds import STANDBYS, STEADY
from .launch import Job
from .options import Options

OURS, REFERENCE, WITHOUT = "areal_ray", "torchrun", "areal_ray-no-standbys"
ARMS = (REFERENCE, "tutorial", "tutorial-best", "hf-ddp", WITHOUT, OURS)
WARM_UP_S = 20.0  # after the first step of both
TURNS = 6  # of each arm, the first one not counted
SETTLE_S, TURN_S = 2.0, 10.0  # not so long that those who wait would take the others for dead
STANDBYS_S = 180.0
LOOK_S = 1.0  # reading a log of some thousand lines takes time from those who are measured

Turn = tuple[float, float]  # when it began to be counted, and ended


def pairs(names: list[str]) -> Iterator[tuple[str, str]]:
    """(reference, arm) of which each is measured beside the other."""
    for name in names:
        if REFERENCE in names and name != REFERENCE:
            yield REFERENCE, name
    if {OURS, WITHOUT} <= set(names):
        yield WITHOUT, OURS


def warm(job: Job, standbys: bool) -> None:
    job.wait(lambda: job.events("step"))
    if standbys:
        job.wait(lambda: arms.standbys_ready(job), STANDBYS_S, LOOK_S, what="no two warm standbys")


def turn(job: Job) -> Turn:
    time.sleep(SETTLE_S)
    began = time.time()
    time.sleep(TURN_S)
    return began, time.time()


def take_turns(one: Job, other: Job) -> tuple[list[Turn], list[Turn]]:
    """Of each of them those that count."""
    turns: tuple[list[Turn], list[Turn]] = ([], [])
    for _ in range(TURNS):
        with other.frozen():
            turns[0].append(turn(one))
        with one.frozen():
            turns[1].append(turn(other))
    return turns[0][1:], turns[1][1:]


def steps(job: Job, turns: list[Turn]) -> Iterator[list[float]]:
    """The times of the steps of each turn."""
    times = [line["time"] for line in job.events("step")]
    for began, ended in turns:
        within = [at for at in times if began <= at <= ended]
        assert len(within) > 10, f"{len(within)} steps in {TURN_S} s"
        yield within


def settings(job: Job) -> set[tuple[int, int]]:
    """Threads and nice levels that its ranks train with."""
    return {(line["threads"], line["nice"]) for rank in range(2) for line in job.events("settings", rank)}


def measure(names: tuple[str, str], task: arms.Task) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By arm, in every turn: tokens per second, and median step time."""
    with ExitStack() as stack:
        jobs = {name: stack.enter_context(arms.started(name, task)) for name in names}
        for name, job in jobs.items():
            warm(job, standbys=name.startswith(OURS) and name != WITHOUT and arms.has_standbys())
        time.sleep(WARM_UP_S)
        turns = take_turns(*jobs.values())
        all_settings = {name: settings(job) for name, job in jobs.items()}
        same = set().union(*all_settings.values())
        assert len(same) == 1, f"not one number of threads and nice level: {all_settings}"
        found = {name: list(steps(job, turns)) for (name, job), turns in zip(jobs.items(), turns, strict=True)}
    rates = {name: [task.tokens * (len(at) - 1) / (at[-1] - at[0]) for at in found[name]] for name in names}
    medians = {name: [statistics.median(b - a for a, b in pairwise(at)) for at in found[name]] for name in names}
    text = ", ".join(f"{name} {statistics.median(rates[name]):.0f} tokens/s" for name in names)
    ratio = statistics.median(report.ratios(rates[names[1]], rates[names[0]]))
    report.said(" and ".join(names), f"{text}: {ratio:.3f}; (threads, nice) {same}")
    return rates, medians


def run(options: Options) -> list[dict]:
    task = arms.Task()
    wanted = list(pairs(arms.available(ARMS, options.only)))
    if not wanted:
        print(f"throughput compares an arm with {REFERENCE}, or {OURS} with {WITHOUT}, and has neither pair here")
        return []
    rates: dict[tuple[str, str], dict[str, list[float]]] = {names: {name: [] for name in names} for names in wanted}
    medians = {names: {name: list[float]() for name in names} for names in wanted}
    for _ in range(options.rounds):
        for names in wanted:
            for all_found, found in zip((rates, medians), measure(names, task), strict=True):
                for name in names:
                    all_found[names][name] += found[name]
    shown = []
    for reference, name in wanted:
        if reference == REFERENCE:
            title = f"steady state, no saves: {name} beside {reference}"
            assert name != OURS or title == STEADY
            shown.append(report.show(title, "tokens/s", rates[reference, name], reference, report.HIGHER))
        else:
            shown.append(report.show(STANDBYS, "s, median step", medians[reference, name], reference))
    return shown
