"""Trackers from config."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from areal_ray.config import Config, ConfigError, TrackerConfig, plugin, redact
from areal_ray.run import RunDir
from areal_ray.train.sinks import MetricsSink
from areal_ray.train.trackers.follower import Cursor, Follower
from areal_ray.train.trackers.subject import Subject

# Class of each, in a module of the same name; config/rules.py knows the names, too.
_CLASSES = {"tensorboard": "TensorBoard", "wandb": "WandB", "mlflow": "MLflow", "trackio": "Trackio"}


def build_tracker(config: Config, index: int, run: RunDir, say: Callable[[str], None]) -> Follower:
    """The tracker that one entry of `trackers` names; a name that means nothing is found by `check_tracker`.

    Its library is imported in the tracker's thread: some take seconds, for which a restart would wait.

    Args:
        config: of the run.
        index: of the entry.
        run: the run directory.
        say: prints a line for the user.
    """
    entry, key = config.trackers[index], f"trackers[{index}]"
    cursor = Cursor(run, f"{index}-{entry.name.rpartition('.')[2].replace(':', '.')}")

    def make(*given: Subject) -> MetricsSink:
        return _find(entry.name, f"{key}.name")(*given, **entry.args)

    if entry.name not in _CLASSES:
        return Follower(entry.name, make, run, cursor, say)
    location = run.storage.location
    subject = Subject(
        id=cursor.id,
        name=config.run.name,
        location=location,
        folder=None if "://" in location else location,
        config=redact(dataclasses.asdict(config)),
        revision=run.revision() or "unknown",
    )
    return Follower(entry.name, lambda: make(subject), run, cursor, say)


def check_tracker(entry: TrackerConfig, key: str) -> None:
    """Raise ConfigError if there is no such tracker, its library is missing, or it does not take these arguments."""
    make = _find(entry.name, f"{key}.name")
    given = [Subject("", "", "", None, {}, "")] if entry.name in _CLASSES else []
    plugin.check_args(make, entry.name, f"{key}.args", *given, **entry.args)


def _find(name: str, key: str) -> Callable[..., MetricsSink]:
    """What makes the tracker that a name means.

    Raises:
        ConfigError: if there is no such thing, or its library is not installed.
    """
    if name not in _CLASSES:
        return plugin.factory(name, key, {})
    try:
        module: Any = importlib.import_module(f"areal_ray.train.trackers.{name}")
    except ModuleNotFoundError as error:
        text = f"{name} needs a package that is not installed ({error.name}): pip install 'areal_ray[{name}]'"
        raise ConfigError(key, text) from None
    made: Callable[..., MetricsSink] = getattr(module, _CLASSES[name])
    return made
