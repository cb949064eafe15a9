"""areal-ray verify-resume: compares an experiment that is killed and resized with an undisturbed run of it."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from areal_ray.checkpoint import StoredState
from areal_ray.config import Config, ConfigError, load
from areal_ray.config.schema import fits
from areal_ray.run import RunDir
from areal_ray.run.metric_names import CLOCK
from areal_ray.storage import Storage, storage_at
from areal_ray.tools import checkpoints

# Relative distance of all weights, |a-b| / |a|, between runs that differ in the order of their sums only. Rounding is
# amplified by every step: on the tiny experiment at 2 -> 1 -> 2 workers 60 steps gave 1.7e-7, 200 steps 2.7e-5.
BOUND = 3e-4
# On a GPU, where no order of sums is fixed, and in bfloat16: on an H200 two runs of 0.13B parameters from the same
# start on the same batch were 1.2e-3 apart after 8 steps and 0.3 after 60; other weights altogether would be 1.4 apart.
GPU_BOUND = 0.6


@dataclass(frozen=True)
class Check:
    """A promise about a run and what was found."""

    run: str
    what: str
    promised: str
    found: str
    kept: bool


@dataclass(frozen=True)
class Segment:
    """A part of a run: up to which step, on how many workers, with kills as (step, rank)."""

    stop_at: int
    workers: int
    kills: tuple[tuple[int, int], ...]


def verify_resume(
    path: str, overrides: Sequence[str], folder: Path, seed: int, kills: int, bound: float | None = None
) -> list[Check]:
    """Run an experiment undisturbed, with kills, and with kills at changing numbers of workers, and compare.

    Args:
        path, overrides: the experiment, as for train.
        folder: an empty directory that all nodes see; the three runs and what they print stay there.
        seed: of the steps and ranks that are killed.
        kills: in each of the disturbed runs.
        bound: relative distance of weights that a change of the number of workers may make, and, on GPUs without
            engine.deterministic, a kill. None: BOUND, or with GPUs GPU_BOUND.

    Raises:
        ConfigError: if the experiment is wrong, or too short for so many kills.
        RuntimeError: if one of the runs fails.
    """
    config = load(path, overrides)
    workers = config.usable_sizes[-1]
    if bound is None:
        bound = GPU_BOUND if config.cluster.use_gpu else BOUND
    if not config.last_step:
        raise ConfigError(
            "train.stop_at", f"is needed for {config.length}: kills are planned before data are looked at"
        )
    if config.last_step < max(4, kills + 3):
        raise ConfigError("train.steps", f"{config.last_step} steps are too few for {kills} kills")
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    runs = {
        "undisturbed": [Segment(config.last_step, workers, ())],
        "killed": [Segment(config.last_step, workers, _kills(draw, kills, 1, config.last_step, workers))],
        "resized": _resized(draw, config, workers, kills),
    }
    for name, segments in runs.items():
        for segment in segments:
            _run(path, overrides, folder, name, segment)
    where = {name: storage_at(str(folder)).sub(name) for name in runs}
    same_bits = not config.cluster.use_gpu or config.engine.deterministic
    return [
        *(
            _exact("killed", where["undisturbed"], where["killed"], kills)
            if same_bits
            else _close("killed", where["undisturbed"], where["killed"], runs["killed"], bound)
        ),
        *_close("resized", where["undisturbed"], where["resized"], runs["resized"], bound),
    ]


def _kills(draw: random.Random, count: int, first: int, last: int, workers: int) -> tuple[tuple[int, int], ...]:
    steps = sorted(draw.sample(range(first + 1, last + 1), min(count, last - first)))
    return tuple((step, draw.randrange(workers)) for step in steps)


def _resized(draw: random.Random, config: Config, workers: int, kills: int) -> list[Segment]:
    """There and back: the given number of workers, another one, the given one."""
    others = [size for size in range(1, 2 * workers + 1) if size != workers and _can(config, size)]
    if not others:
        raise ConfigError("cluster.num_workers", f"mesh and global batch allow no other number than {workers}")
    other = max([size for size in others if size < workers], default=others[0])
    ends = [*sorted(draw.sample(range(2, config.last_step), 2)), config.last_step]
    shares = [kills // 3 + (i < kills % 3) for i in range(3)]
    segments, begin = [], 0
    for end, size, share in zip(ends, (workers, other, workers), shares, strict=True):
        segments.append(Segment(end, size, _kills(draw, share, begin, end, size)))
        begin = end
    return segments


def _can(config: Config, size: int) -> bool:
    return fits(replace(config, cluster=replace(config.cluster, num_workers=size)), size)


def _run(path: str, overrides: Sequence[str], folder: Path, name: str, segment: Segment) -> None:
    faults = ", ".join(f"{{kind: sigkill, rank: {rank}, step: {step}}}" for step, rank in segment.kills)
    own = [
        f"run.storage_path={folder}",
        f"run.name={name}",
        f"cluster.num_workers={segment.workers}",
        f"cluster.max_failures={len(segment.kills)}",
        f"train.stop_at={segment.stop_at}",
        f"faults=[{faults}]",
        "logging.sample_ids=true",
        # It is no end that anybody waits for, and it comes when it is due.
        *("on_end=null", "export=null", "eval.early_stopping=null"),
    ]
    killed = f", killed before {', '.join(str(step) for step, _ in segment.kills)}" if segment.kills else ""
    print(f"{name}: to step {segment.stop_at} on {segment.workers} workers{killed} ... ", end="", flush=True)
    began, log = time.monotonic(), folder / f"{name}.log"
    with open(log, "a") as output:
        command = [sys.executable, "-m", "areal_ray.cli.main", "train", "--config", path, *overrides, *own]
        status = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    if status != 0:
        tail = "".join(log.read_text().splitlines(keepends=True)[-15:])
        raise RuntimeError(f"the run {name} ended with exit status {status}; the end of {log}:\n{tail}")


def _exact(name: str, undisturbed: Storage, run: Storage, kills: int) -> list[Check]:
    a, b = RunDir(undisturbed), RunDir(run)
    digests = [checkpoints.digest(_last(storage)) for storage in (undisturbed, run)]
    restarts = sum(event["event"] == "failure" for event in b.events())
    return [
        Check(name, "kills that happened", str(kills), str(restarts), restarts == kills),
        _same_samples(name, a, b),
        equal(name, "logged metrics", lines_of(a), lines_of(b)),
        Check(name, "digest of the end", digests[0][:16], digests[1][:16], digests[0] == digests[1]),
    ]


def _close(name: str, undisturbed: Storage, run: Storage, segments: list[Segment], bound: float) -> list[Check]:
    a, b = RunDir(undisturbed), RunDir(run)
    sizes = [event["world_size"] for event in b.events("attempt")]
    changes = [size for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
    wanted = [segment.workers for segment in segments]
    kills = sum(len(segment.kills) for segment in segments)
    failures = len(b.events("failure"))
    distance, largest = _distance(_last(undisturbed), _last(run))
    rates = [[(line["step"], line["lr"]) for line in of.metrics() if "lr" in line] for of in (a, b)]
    return [
        Check(name, "numbers of workers", _arrows(wanted), _arrows(changes), changes == wanted),
        Check(name, "kills that happened", str(kills), str(failures), failures == kills),
        _same_samples(name, a, b),
        equal(name, "learning rates", *_common(*rates)),
        Check(
            name,
            "weights, |a-b| / |a|",
            f"<= {bound:g}",
            f"{distance:.2g} (max |a-b| {largest:.2g})",
            distance <= bound,
        ),
    ]


def _same_samples(name: str, a: RunDir, b: RunDir) -> Check:
    return equal(name, "global batches, sample ids in order", a.samples(), b.samples())


def equal(name: str, what: str, a: list[Any], b: list[Any]) -> Check:
    """Two lists that are to be the same, and not empty."""
    differing = sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
    found = "the same" if not differing else f"{differing} differ"
    return Check(name, what, f"the same {len(a)}", found, bool(a) and not differing)


def _common(a: list[tuple[int, float]], b: list[tuple[int, float]]) -> tuple[list[Any], list[Any]]:
    # A run that ends in between logs that step too.
    steps = {step for step, _ in a}
    return a, [line for line in b if line[0] in steps]


def lines_of(run: RunDir) -> list[dict[str, Any]]:
    """The logged steps without what the clock says."""
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in run.metrics()]


def _arrows(sizes: Sequence[int]) -> str:
    return " -> ".join(str(size) for size in sizes)


def _last(run: Storage) -> Storage:
    result = RunDir(run).result()
    assert result is not None
    return run.sub(result["checkpoint"])


def _distance(a: Storage, b: Storage) -> tuple[float, float]:
    """Distance of all weights together, |a-b| / |a| (2-norms), and the largest |a-b| of one weight."""
    one, other = StoredState(a), StoredState(b)
    difference = norm = largest = 0.0
    for name in (name for name in one.names if name.startswith("engine.model.")):
        x, y = one.tensor(name).double(), other.tensor(name).double()
        difference += float((x - y).square().sum())
        norm += float(x.square().sum())
        largest = max(largest, float((x - y).abs().max()))
    return math.sqrt(difference / norm), largest
