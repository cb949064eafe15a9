"""Everything that is to be seen of a run, read from its directory."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import yaml

from areal_ray.config import Config, dump
from areal_ray.run import RunDir
from areal_ray.run.directory import CONFIG
from areal_ray.run.goodput import account, course
from areal_ray.run.lease import holder

_LINES = 4000  # of metrics: more than a screen has points
_EVENTS = (
    "deleted", "submitted", "attempt", "group", "training", "started", "restored", "saved", "save_failed", "failure",
    "left", "not_started", "controller_died", "controller_trouble", "bad_step", "poison_step", "passed_over",
    "bad_device", "given_up", "fault", "straggler", "finished", "stopped", "interrupted", "failed",
)  # fmt: skip
ENDS = ("finished", "stopped", "interrupted", "failed")
_ALIVE_S = 60.0  # the lease is renewed every few seconds; clocks of machines differ by less


@dataclass(frozen=True)
class Course:
    """A run as its directory shows it.

    Args:
        name, location: of the run directory.
        status: running, finished, stopped, interrupted, failed, or gone (it has not ended, and nobody works on it).
        config: as it was resolved; empty if there is none.
        differs: the keys that differ from the defaults, dotted, with their values.
        notes: the git revision and the overrides, as they were typed.
        metrics: logged steps, oldest first; of a long run some thousand.
        events: of the ledger, oldest first, but for those that no reader asks for.
        result: of the last submission that came to its end; empty if none did.
        account: where the time went, see `areal_ray.run.goodput.account`.
        checkpoint: what the newest checkpoint says of itself; empty if there is none.
    """

    name: str
    location: str
    status: str
    config: dict[str, Any]
    differs: dict[str, Any]
    notes: list[str]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    result: dict[str, Any]
    account: dict[str, Any]
    checkpoint: dict[str, Any]

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of these kinds."""
        return [event for event in self.events if event["event"] in kinds]

    @property
    def step(self) -> int:
        """The step at which the run has ended, else the last that was logged."""
        return last_step(self.events, self.metrics)

    @property
    def steps(self) -> int | None:
        """The length of the run."""
        steps = self.config.get("train", {}).get("steps")
        return steps if isinstance(steps, int) else None

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        values = (line[name] for line in reversed(self.metrics) if isinstance(line.get(name), (int, float)))
        return next(values, None)


def read_course(run: RunDir) -> Course:
    """Read a run; grows with its ledger and its metrics only as fast as they are looked through.

    Raises:
        ValueError: if there is no run.
        OSError: if it cannot be read.
    """
    if not run.exists():
        raise ValueError(f"{run.storage.location}: there is no run")
    config, notes = read_config(run)
    events, metrics = run.events_of(*_EVENTS), run.sampled_metrics(_LINES)
    result = run.result() or {}
    return Course(
        name=run.storage.location.rstrip("/").rpartition("/")[2],
        location=run.storage.location,
        status=status(run, events),
        config=config,
        differs=_differences(config),
        notes=notes,
        metrics=metrics,
        events=events,
        result=result,
        account=account(course(events, metrics)),
        checkpoint=_newest_checkpoint(run, events),
    )


def read_config(run: RunDir) -> tuple[dict[str, Any], list[str]]:
    """The resolved configuration of a run, and the comments above it; empty if there is none."""
    if run.storage.size(CONFIG) is None:
        return {}, []
    text = run.storage.read(CONFIG).decode(errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    notes = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    return config if isinstance(config, dict) else {}, notes


def status(run: RunDir, events: list[dict[str, Any]]) -> str:
    """What has become of a run, by its ledger and its lease.

    Args:
        events: of which those of submissions and of their ends count.
    """
    end = _end(events)
    if end is not None:
        return str(end["event"])
    driver = holder(run.storage)
    alive = driver is not None and time.time() - driver.get("time", 0.0) < _ALIVE_S
    return "running" if alive else "gone"


def last_step(events: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> int:
    """The step at which a run has ended, which may have no line of its own; else the last that was logged."""
    at = (_end(events) or {}).get("step")
    return at if isinstance(at, int) else max((int(line["step"]) for line in metrics), default=0)


def _end(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The event with which the newest submission has ended; None if it has not."""
    turns = [event for event in events if event["event"] in ("submitted", *ENDS)]
    return turns[-1] if turns and turns[-1]["event"] in ENDS else None


def stored(events: list[dict[str, Any]]) -> dict[str, int]:
    """The checkpoints that a run has by its ledger, oldest first, with their bytes."""
    sizes: dict[str, int] = {}
    for event in events:
        if event["event"] == "saved":
            sizes[event["checkpoint"]] = event["bytes"]
        elif event["event"] == "deleted":
            sizes.pop(event["checkpoint"], None)
    return sizes


def _newest_checkpoint(run: RunDir, events: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's words of the newest checkpoint; without those of `areal_ray.checkpoint`, which brings torch: one
    is looked at more often than trained."""
    for name in reversed(stored(events)):
        with suppress(OSError, ValueError, KeyError, TypeError):  # gone since, or damaged: for `areal-ray ckpt`
            return {**json.loads(run.storage.sub(name).read("manifest.json"))["info"], "name": name}
    return {}


def _differences(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that differ from the defaults."""
    if not config:
        return {}
    defaults = flat(yaml.safe_load(dump(Config())))
    own = flat(config)
    return {key: value for key, value in own.items() if key not in defaults or defaults[key] != value}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration as dotted keys and values; lists are values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
