"""Invariants of a run after chaos, read from its ledger and its checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from areal_ray.checkpoint import Catalog
from areal_ray.run import RunDir
from areal_ray.storage import storage_at
from areal_ray.tools import checkpoints
from areal_ray.tools.chaos.world import World, run_undisturbed
from areal_ray.tools.verify_resume import Check, equal, lines_of

_RUN = "chaos"


def check(world: World, status: int, path: str, overrides: Sequence[str], folder: Path, workers: int) -> list[Check]:
    """Compare a disturbed run with its undisturbed twin, which is trained here.

    Args:
        world: of the disturbed run, which has been asked to stop.
        status: its driver's.
        path, overrides: the experiment.
        folder: for the twin.
        workers: their number.
    """
    last = world.newest()
    assert last is not None
    step = Catalog.version(last)[1]
    twin = folder / "twin"
    own = [
        f"run.storage_path={twin}",
        "run.name=undisturbed",
        "train.steps=1000000",
        f"train.stop_at={step}",
        "logging.sample_ids=true",
        *("on_end=null", "export=null", "eval.early_stopping=null"),
        "checkpoint.keep.last=1",
        f"cluster.num_workers={workers}",
    ]
    run_undisturbed(path, [*overrides, *own], folder / "undisturbed.log")
    other = RunDir(storage_at(str(twin)).sub("undisturbed"))
    result = other.result()
    assert result is not None
    digests = [
        checkpoints.digest(storage) for storage in (other.storage.sub(result["checkpoint"]), world.storage.sub(last))
    ]
    checks = [
        Check(_RUN, "exit status after SIGTERM", "130", str(status), status == 130),
        *restores(world.run, world.seen, world.damaged),
        equal(_RUN, "global batches, sample ids in order", other.samples(), world.run.samples()),
        equal(_RUN, "logged metrics", lines_of(other), lines_of(world.run)),
        Check(_RUN, f"digest at step {step}", digests[0][:16], digests[1][:16], digests[0] == digests[1]),
    ]
    shutil.rmtree(twin)
    return checks


def restores(run: RunDir, seen: Mapping[str, float], damaged: Collection[str]) -> list[Check]:
    """Whether every restore took what had been committed, and the newest of it that was not damaged.

    Args:
        run: the disturbed run.
        seen: committed checkpoints that were seen from outside, and when: the ledger does not know one whose rank 0 was
            killed between the commit and the line about it.
        damaged: checkpoints that were damaged on purpose.
    """
    times = {event["checkpoint"]: event["time"] for event in run.events("saved")}
    times |= {name: min(at, times.get(name, at)) for name, at in seen.items()}
    unknown, lost, count = [], [], 0
    for event in run.events():
        before = [name for name, at in times.items() if at < event["time"] and name not in damaged]
        if event["event"] == "started":  # from the beginning, though something had been committed
            lost += before
        if event["event"] != "restored":
            continue
        count += event["checkpoint"] is not None
        # A copy in memory may be newer than all that was committed, and is in nobody's list.
        if event["checkpoint"] is not None and event["checkpoint"] not in times:
            unknown.append(event["checkpoint"])
        name = event["checkpoint"] or event["memory"]
        if before and Catalog.version(name) < max(map(Catalog.version, before)):
            lost.append(max(before, key=Catalog.version))
    return [
        Check(_RUN, "restores of what was committed", str(count), str(count - len(unknown)), not unknown),
        Check(_RUN, "committed steps lost", "0", str(len(lost)) + (f" ({lost[0]})" if lost else ""), not lost),
    ]
