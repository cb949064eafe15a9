"""How much of a run's time went into steps that counted, from its ledger and its metrics."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from areal_ray.rundir import RunDir


def goodput(run: RunDir) -> dict[str, Any]:
    """Seconds from each submission to its last sign of life, seconds in steps that stand, and the share.

    Steps that were lost with a worker and computed again stand once; the time of evaluation, saves and restarts is not
    theirs.
    """
    events = run.events()
    starts = [i for i, event in enumerate(events) if event["event"] == "submitted"]
    wall = sum(events[after - 1]["time"] - events[i]["time"] for i, after in pairwise([*starts, len(events)]))
    timed = [line for line in run.metrics() if "step_time_s" in line]
    steps = [0] + [line["step"] for line in timed]
    in_steps = sum(line["step_time_s"] * (b - a) for line, (a, b) in zip(timed, pairwise(steps), strict=True))
    share = round(in_steps / wall, 4) if wall > 0 else None
    return {"wall_s": round(wall, 2), "steps_s": round(in_steps, 2), "share": share}
