"""The file that says what a sweep tries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from areal_ray.config import ConfigError

_KINDS = {"grid": None, "choice": None, "uniform": 2, "log_uniform": 2, "int_uniform": 2}
_SCHEDULERS = ("none", "asha", "pbt")
_LEAST = {"trials": 1, "concurrent": 1, "grace_steps": 1, "reduction_factor": 2, "perturb_steps": 1, "seed": 0}


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Args:
        space: for dotted keys of the configuration `{grid: [...]}` (each value), `{choice: [...]}` (one of them),
            `{uniform: [low, high]}`, `{log_uniform: [low, high]}` or `{int_uniform: [low, high]}`.
        trials: samples of the whole space; every one of them tries all combinations of the grids.
        metric, mode: by which trials are judged, a metric of an evaluation; min or max.
        concurrent: trials that train at the same time.
        scheduler: none; asha: trials that are behind are stopped early (Li et al., https://arxiv.org/abs/1810.05934);
            or pbt: they go on from the checkpoint of a better one, with other values (Jaderberg et al.,
            https://arxiv.org/abs/1711.09846). With pbt all trials train at the same time.
        grace_steps: training steps that asha and pbt grant each trial.
        reduction_factor: of so many trials asha lets one go on.
        perturb_steps: training steps between two looks of pbt at a trial.
        quantile: share of the trials that pbt has go on elsewhere, and of those that they go on from; 0.5 at most.
        seed: of the samples.
    """

    space: Mapping[str, Mapping[str, list[Any]]]
    trials: int = 1
    metric: str = "held_out_loss"
    mode: str = "min"
    concurrent: int = 1
    scheduler: str = "none"
    grace_steps: int = 1
    reduction_factor: int = 3
    perturb_steps: int = 100
    quantile: float = 0.25
    seed: int = 0


def read_sweep(path: str) -> Sweep:
    """Read the file of a sweep.

    Raises:
        ConfigError: one line that names file and key.
    """
    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("", " ".join(str(error).split())[:200], path) from None
    if not isinstance(found, dict):
        raise ConfigError("", "must hold a mapping of keys to values", path)
    known = list(Sweep.__dataclass_fields__)
    if unknown := sorted(set(found) - set(known)):
        raise ConfigError(unknown[0], f"no such key; there are: {', '.join(known)}", path)
    space = found.get("space")
    if not isinstance(space, dict) or not space:
        raise ConfigError("space", "must name at least one key of the configuration", path)
    for key, what in space.items():
        _check(str(key), what, path)
    for name, least in _LEAST.items():
        if name in found and not (type(found[name]) is int and found[name] >= least):
            raise ConfigError(name, f"must be a whole number, {least} or more, not {found[name]!r}", path)
    if type(share := found.get("quantile", 0.25)) not in (int, float) or not 0 < share <= 0.5:
        raise ConfigError("quantile", f"must be above 0 and 0.5 at most, not {share!r}", path)
    if found.get("mode", "min") not in ("min", "max"):
        raise ConfigError("mode", f"is min or max, not {found['mode']!r}", path)
    if found.get("scheduler", "none") not in _SCHEDULERS:
        raise ConfigError("scheduler", f"knows {', '.join(_SCHEDULERS)}, not {found['scheduler']!r}", path)
    return Sweep(**found)


def _check(key: str, what: Any, path: str) -> None:
    if not (isinstance(what, dict) and len(what) == 1 and next(iter(what)) in _KINDS):
        raise ConfigError(f"space.{key}", f"is one of {', '.join(_KINDS)}, with a list", path)
    kind, values = next(iter(what.items()))
    count = _KINDS[kind]
    if not isinstance(values, list) or not values or (count is not None and len(values) != count):
        raise ConfigError(f"space.{key}", f"{kind} takes a list of {'two numbers' if count else 'values'}", path)
    # YAML 1.1 reads 1e-4 as text.
    if count is not None:
        try:
            low, high = (float(value) for value in values)
        except (TypeError, ValueError):
            raise ConfigError(f"space.{key}", f"{kind} takes two numbers, not {values}", path) from None
        if not low < high or (kind == "log_uniform" and low <= 0):
            raise ConfigError(f"space.{key}", f"{kind} takes a lower and a higher number, not {values}", path)
