"""The trials of a sweep: what each tries, drawn before anything starts, so that all of it can be checked."""

from __future__ import annotations

import json
import math
import random
from itertools import product
from typing import Any

from areal_ray.tools.sweep.space import Sweep

# Keys of which nothing that is built depends, nor the state of a checkpoint: a run may go on with other values.
PLAIN = (
    *("optim.lr", "optim.weight_decay", "optim.betas", "optim.eps", "optim.clip_grad_norm", "optim.min_lr_ratio"),
    *("train.bad_step.spike_factor",),
)
_GOES_ON_WITH = (*PLAIN, "objective.args.")


def draw(space: Sweep) -> list[dict[str, Any]]:
    """The values of each trial by their keys. The first n samples are the same, however many there are."""
    rng = random.Random(space.seed)
    grids = {key: values for key, (kind, values) in kinds(space).items() if kind == "grid"}
    trials = []
    for _ in range(space.trials):
        for chosen in product(*grids.values()):
            fixed = dict(zip(grids, chosen, strict=True))
            sampled = {key: _sample(rng, *what) for key, what in kinds(space).items() if key not in grids}
            trials.append({key: {**fixed, **sampled}[key] for key in space.space})
    return trials


def kinds(space: Sweep) -> dict[str, tuple[str, list[Any]]]:
    """Kind and values of each key."""
    return {key: next(iter(what.items())) for key, what in space.space.items()}


def ends(space: Sweep) -> list[dict[str, Any]]:
    """What pbt may make of one key at a time: each value of a list, both ends of a range."""
    return [{key: value} for key, (_, values) in kinds(space).items() for value in values]


def fixed_key(space: Sweep) -> str | None:
    """The first key that pbt cannot change, as a run cannot go on with another value of it; None if there is none."""
    return next((key for key in space.space if not key.startswith(_GOES_ON_WITH)), None)


def overrides(values: dict[str, Any]) -> list[str]:
    """Values as key=value strings; what is no text as JSON, which is YAML."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def clamp(space: Sweep, values: dict[str, Any]) -> dict[str, Any]:
    """Values as pbt has changed them, taken back into their ranges."""
    inside = dict(values)
    for key, (kind, given) in kinds(space).items():
        if kind not in ("grid", "choice"):
            low, high = float(given[0]), float(given[1])
            inside[key] = min(max(values[key], low), high)
            if kind == "int_uniform":
                inside[key] = round(inside[key])
    return inside


def _sample(rng: random.Random, kind: str, values: list[Any]) -> Any:
    if kind == "choice":
        return rng.choice(values)
    low, high = float(values[0]), float(values[1])
    if kind == "int_uniform":
        return rng.randint(int(low), int(high))
    if kind == "log_uniform":
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    return rng.uniform(low, high)
