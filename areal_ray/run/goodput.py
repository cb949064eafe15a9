"""Goodput: where a run's time went, from its ledger and its metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from areal_ray.run import RunDir

# The phases of a restart, in order, and the event of the ledger that has each.
PHASES = {
    "detection_s": "failure",  # from what the first survivor saw to the controller
    "teardown_s": "group",
    "wait_s": "group",  # until one may begin again: there is room, and failures in a row have been waited between
    "start_s": "group",  # until the nodes have room
    "imports_s": "group",  # of new processes, with their start; of standbys next to nothing
    "process_group_s": "group",
    "launch_s": "group",  # of the training function
    "connect_s": "training",  # first collectives of all groups of the mesh
    "build_s": "training",  # model, optimizer
    "data_s": "training",  # text, and the other objects of a rank
    "load_s": "training",  # checkpoint
    "first_step_s": "training",
}


# Other events that say why workers were started, and how far they had come.
_REASONS = {"controller_died", "controller_trouble", "not_started", "left", "submitted"}
_TOLD = _REASONS | set(PHASES.values()) | {"attempt", "restored", "started"}


@dataclass(frozen=True)
class History:
    """The course of a run, from one pass over its ledger and one over its metrics.

    Args:
        events: on which starts and restarts turn, oldest first; some for every attempt.
        wall_s, steps_s, saves_s, data_s: as `account` has them.
        held_out: (step, loss) of every evaluation.
    """

    events: list[dict[str, Any]]
    wall_s: float
    steps_s: float
    saves_s: float
    data_s: float
    held_out: list[tuple[int, float]]


def history(run: RunDir) -> History:
    """Read the course of a run from its logs."""
    return course(run.each_event(), run.each_metric())


def course(events: Iterable[dict[str, Any]], metrics: Iterable[dict[str, Any]]) -> History:
    """The course of a run from its ledger, oldest event first, and from all or some of its logged steps."""
    told: list[dict[str, Any]] = []
    wall = saves = 0.0
    submitted: float | None = None
    last = 0.0
    for event in events:
        if event["event"] == "submitted":
            wall += 0.0 if submitted is None else last - submitted
            submitted = event["time"]
        if event["event"] in _TOLD:
            told.append(event)
        if event["event"] == "saved":
            saves += event.get("blocked_s") or 0.0
        last = event.get("time", last)
    wall += 0.0 if submitted is None else last - submitted
    timed: list[tuple[int, float, float]] = []
    held_out: list[tuple[int, float]] = []
    for line in metrics:
        if "step_time_s" in line:
            timed.append((line["step"], line["step_time_s"], line.get("data_s", 0.0)))
        if "held_out_loss" in line:
            held_out.append((line["step"], line["held_out_loss"]))
    steps = waits = 0.0
    before = 0
    for step, seconds, waited in sorted(timed):  # clocks of different nodes may differ
        steps, waits, before = steps + seconds * (step - before), waits + waited * (step - before), step
    return History(told, wall, steps, saves, waits, sorted(held_out))


def goodput(run: RunDir) -> dict[str, Any]:
    """The account of a run; see `account`."""
    return account(history(run))


def account(past: History) -> dict[str, Any]:
    """The account of a run.

    Returns:
        wall_s: from each submission to its last sign of life.
        steps_s: in steps that stand; those that were lost with a worker and computed again stand once.
        share: steps_s / wall_s.
        saves_s: in which training was blocked by saves.
        data_s: of steps_s, in which rank 0 waited for batches.
        lost_steps: that were computed and lost, as far as that is known.
        attempts: for every start of the workers why it came, its phases in seconds, and lost steps.
    """
    attempts = _attempts(past.events)
    return {
        "wall_s": round(past.wall_s, 2),
        "steps_s": round(past.steps_s, 2),
        "share": round(past.steps_s / past.wall_s, 4) if past.wall_s > 0 else None,
        "saves_s": round(past.saves_s, 2),
        "data_s": round(past.data_s, 2),
        "lost_steps": sum(attempt["lost_steps"] or 0 for attempt in attempts),
        "attempts": attempts,
    }


def _attempts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for every start of the workers, oldest first."""
    found: list[dict[str, Any]] = []
    since: list[dict[str, Any]] = []  # events that led to the next attempt
    for event in events:
        since.append(event)
        if event["event"] == "attempt":
            found.append({"attempt": event["attempt"], "after": _reason(since), "lost_steps": None})
        if event["event"] in ("attempt", "training", "restored", "started") and found:
            found[-1].update(_times(since))
            if event["event"] in ("restored", "started") and len(found) > 1 and event.get("step") is not None:
                found[-1]["lost_steps"] = _lost_steps(since, event)
        if event["event"] == "training":
            since = []
    return found


def _lost_steps(since: list[dict[str, Any]], restored: dict[str, Any]) -> int | None:
    """Steps that are computed again; None if nobody knows how far the workers had come.

    Args:
        since: the events that led to this start.
        restored: how the start began.
    """
    step, reached = restored["step"], restored.get("reached", 0)
    # What a survivor said, or the last line of the metrics, where nobody survived to say it.
    known = [e["step"] - 1 for e in since if e["event"] == "failure" and e.get("step")]
    known += [reached] if reached > step else []  # else there may have been steps without a line
    known += [e["step"] for e in since if e["event"] == "left"]  # with a save
    return max(0, max(known) - step) if known else None


def _times(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each phase, the last time that it was gone through."""
    times: dict[str, float] = {}
    for event in events:
        times |= {p: event[p] for p, kind in PHASES.items() if event["event"] == kind and event.get(p) is not None}
    return times


def _reason(events: list[dict[str, Any]]) -> str:
    """Why workers were started: the last thing that happened before."""
    for event in reversed(events):
        if event["event"] == "failure":
            return f"worker {event['rank']}: {event.get('cause', 'unknown')}"
        if event["event"] in ("controller_died", "controller_trouble"):
            return "the controller failed"
        if event["event"] == "not_started":
            return "the workers did not start"
        if event["event"] == "left":
            return str(event["reason"])
        if event["event"] == "submitted":
            return "submitted"
    return "unknown"


def table(account: dict[str, Any]) -> str:
    """The account as lines for the end of a run."""
    rows = [["attempt", "after", *(name.removesuffix("_s").replace("_", " ") for name in PHASES), "lost steps"]]
    for attempt in account["attempts"]:
        seconds = [f"{attempt[name]:.1f}" if name in attempt else "-" for name in PHASES]
        lost = "-" if attempt["lost_steps"] is None else str(attempt["lost_steps"])
        rows.append([str(attempt["attempt"]), attempt["after"][:40], *seconds, lost])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        aligned.append([cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in cells])
    return "\n".join("  ".join(row).rstrip() for row in aligned)
