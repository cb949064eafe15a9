"""What the project promises of its figures, and the titles of the tables that the promises are about."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .report import ratios

KILLED = "SIGKILL of a worker to the next finished step"
CODE_RUNS = "SIGKILL of a worker until the training code runs again"
PHASES = "a restart of areal_ray, by phases"
TRACKED = "steady state with all trackers beside none"
STOPPED = "SIGSTOP of a worker to the next finished step"
NODE = "a node with a worker removed to the next finished step"
LOSSES = "goodput under losses of workers and nodes, beside none"
STANDBYS = "step time, no saves: areal_ray beside areal_ray-no-standbys"
STEADY = "steady state, no saves: areal_ray beside torchrun"
START = "command to first finished step, running cluster"
BLOCKED = "blocked time per save"
STALL = "effective stall per save: (time with - time without) / saves"
COMMITTED = "staged to committed, while training"
STEP_PEAK = "peak memory of a step that accumulates gradients"

FIRST_SAVE = "time that the first save after a restart blocks, 30M parameters"
SECOND, LOAD = "second save", "load"  # of the part `metadata`
CPU, BUSIEST, SENT, PEAK = (
    "CPU of a rank, mean",
    "CPU of a rank, the busiest",
    "sent for each rank",
    "memory beyond that before, the most of any rank",
)

PLAIN_WRITE = "one file and fsync, idle"
STOPPED_ARM = "areal_ray, SIGSTOP"


def metadata_of(work: str, what: str, ranks: int) -> str:
    """The title of a table of the part `metadata`."""
    return f"{work}, 100 tensors, {ranks} ranks: {what}"


def simulated(what: str) -> str:
    """The title of a table of the part `scale`."""
    return f"simulated, 70B: {what}"


def goodput_beside(peer: str) -> str:
    """The title of a table: one for each arm that areal_ray runs beside."""
    return f"goodput under kills: areal_ray beside {peer}"


def steps_over_time(beside: str) -> str:
    """The title of the curves of the first round of `goodput_beside`."""
    return f"{beside}: finished steps over time, first round"


Tables = Mapping[str, dict[str, Any]]


def _ratio(title: str, arm: str, to: str) -> Callable[[Tables], float | None]:
    """Median of the ratios of paired rounds, or the ratio of the medians, as the table has it."""

    def measured(tables: Tables) -> float | None:
        rows = tables[title]["arms"]
        if arm not in rows or to not in rows:
            return None
        found = ratios(rows[arm]["values"], rows[to]["values"], tables[title]["paired"])
        return statistics.median(found) if found else None

    return measured


def _stopped(tables: Tables) -> float | None:
    """Seconds, beyond what a SIGKILL takes."""
    killed = tables[KILLED]["arms"].get("areal_ray") if KILLED in tables else None
    return tables[STOPPED]["arms"][STOPPED_ARM]["median"] - killed["median"] if killed else None


def _growth(work: str, most: int, few: int) -> Callable[[Tables], float | None]:
    """Memory with more ranks beside that with fewer."""

    def measured(tables: Tables) -> float | None:
        one, other = (tables[metadata_of(work, PEAK, ranks)]["arms"]["areal_ray"]["median"] for ranks in (most, few))
        return one / other if other else None

    return measured


def _at_1024(what: str, limit: float) -> Bound:
    """Of 1,024 ranks in one mesh of shards and in two, whichever needs more."""

    def measured(tables: Tables) -> float | None:
        arms = tables[simulated(what)]["arms"]
        return max(float(arms[label]["median"]) for label in ("1024 ranks", "2 x 512 ranks"))

    return Bound(f"1,024 ranks: {what}", simulated(what), measured, "<=", limit)


@dataclass(frozen=True)
class Bound:
    """Args:
    what: is promised.
    title: of the table that it is about.
    measured: from the tables; None where an arm did not run.
    sign: "<=", ">=" or ">".
    limit: of what was measured.
    """

    what: str
    title: str
    measured: Callable[[Tables], float | None]
    sign: str
    limit: float

    def met(self, value: float) -> bool:
        return {"<=": value <= self.limit, ">=": value >= self.limit, ">": value > self.limit}[self.sign]


def _bound(what: str, title: str, arm: str, to: str, sign: str, limit: float) -> Bound:
    return Bound(f"{what}, {arm} / {to}", title, _ratio(title, arm, to), sign, limit)


BOUNDS = (
    _bound("SIGKILL", KILLED, "areal_ray", "tutorial", "<=", 0.25),
    Bound("SIGSTOP, areal_ray, seconds beyond its SIGKILL", STOPPED, _stopped, "<=", 15.0),
    _bound("node removed", NODE, "areal_ray", "tutorial", "<=", 0.25),
    _bound("step time, standbys on / off", STANDBYS, "areal_ray", "areal_ray-no-standbys", "<=", 1.02),
    _bound("throughput, all trackers / none", TRACKED, "areal_ray-trackers", "areal_ray", ">=", 0.99),
    _bound("throughput", STEADY, "areal_ray", "torchrun", ">=", 0.98),
    _bound("start", START, "areal_ray", "tutorial", "<=", 0.6),
    _bound("goodput", goodput_beside("tutorial"), "areal_ray", "tutorial", ">=", 1.4),
    _bound("goodput", goodput_beside("torchrun-dcp"), "areal_ray", "torchrun-dcp", ">", 1.0),
    _bound("goodput, losses of workers and nodes", LOSSES, "areal_ray-partners", "areal_ray", ">=", 0.9),
    _bound("blocked per save", BLOCKED, "areal_ray", "tutorial", "<=", 0.15),
    _bound("effective stall per save", STALL, "areal_ray", "tutorial", "<=", 0.35),
    _bound("staged to committed", COMMITTED, "areal_ray", PLAIN_WRITE, ">=", 0.6),
    _bound("first save after a restart", FIRST_SAVE, "first", "later, median", "<=", 2.0),
    *(
        _bound(f"{work}, 32 ranks, {what}", metadata_of(work, what, 32), "areal_ray", "dcp", "<=", 1.2)
        for work in (SECOND, LOAD)
        for what in (CPU, BUSIEST, SENT)
    ),
    *(
        Bound(f"{work}, memory at 16 ranks / at 8", metadata_of(work, PEAK, 16), _growth(work, 16, 8), "<=", 1.3)
        for work in (SECOND, LOAD)
    ),
    _at_1024("first save, rank 0: planning, s", 10.0),
    _at_1024("first save, other ranks: planning, s", 1.0),
    _at_1024("later save, every rank: whether the plan fits, s", 1.0),
    _at_1024("later save, rank 0: commit, s", 1.0),
    _at_1024("restore, every rank: metadata, s", 5.0),
    _at_1024("restore, every rank: MB of metadata", 200.0),
    _bound("peak of a step", STEP_PEAK, "2 ranks, sharded", "1 rank, sharded", "<=", 0.6),
)


def judge(results: list[dict[str, Any]]) -> list[str]:
    """A line for each promise about which something was measured."""
    tables = {result["title"]: result for result in results}
    lines = []
    for bound in BOUNDS:
        value = bound.measured(tables) if bound.title in tables else None
        if value is not None:
            verdict = "met" if bound.met(value) else "NOT met"
            lines.append(f"  {bound.what:<56} {value:>8.3f}   {bound.sign:>2} {bound.limit:<5g}  {verdict}")
    return lines
