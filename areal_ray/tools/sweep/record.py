"""The record of a sweep: what it tries, how far each trial is, which have ended. By it an interrupted sweep goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from areal_ray.config import ConfigError
from areal_ray.storage import Storage
from areal_ray.tools.sweep.space import Sweep

RECORD = "sweep.json"
_MAY_CHANGE = ("concurrent", "trials")  # between one start and the next


class Record:
    """sweep.json in the sweep's folder: written whole at every change, by the one process that drives the sweep.

    A trial is known by its name; the run that it trains at present has the same, or with pbt the name of a later one.

    Args:
        folder: of the sweep.
        space: what is tried.
        trials: values of each trial by key.
        name: of the experiment's run, with which the trials' begin.

    Raises:
        ConfigError: if the folder has a sweep of something else.
        OSError: if it cannot be written.
    """

    def __init__(self, folder: Storage, space: Sweep, trials: Sequence[dict[str, Any]], name: str) -> None:
        self._folder, self._metric = folder, space.metric
        asked = json.loads(json.dumps(asdict(space)))
        self._was = self._content()
        before = None if self._was is None else self._read(self._was)
        if before is not None:
            _check_same(before["space"], asked)
        found = {} if before is None else before["trials"]
        self._space = asked
        self._trials: dict[str, dict[str, Any]] = {}
        for number, values in enumerate(trials):
            trial = f"{name}-{number:02}"  # whatever their number: more may come later
            begun = {"run": trial, "values": json.loads(json.dumps(values)), "ended": None}
            self._trials[trial] = found.get(trial, begun)
        self.goes_on = bool(found)

    def trials(self) -> dict[str, dict[str, Any]]:
        """Every trial by its name: its present `run`, the `values` that it tries, `ended`: its last result, or None."""
        return self._trials

    def open(self) -> list[str]:
        """Names of the trials that have not ended."""
        return [name for name, trial in self._trials.items() if trial["ended"] is None]

    def note(self, trial: str, run: str, values: dict[str, Any]) -> None:
        """Note the run that a trial trains, and what it tries (OSError)."""
        before = self._trials[trial]
        if (before["run"], before["values"]) != (run, values):
            self._trials[trial] = {"run": run, "values": values, "ended": None}
            self.write()

    def end(self, trial: str, step: int | None, value: float | None) -> None:
        """Note that a trial has ended, by itself or as the sweep has stopped it (OSError).

        Args:
            step, value: of its last evaluation.
        """
        self._trials[trial]["ended"] = {"step": step, self._metric: value}
        self.write()

    def is_current(self) -> bool:
        """Whether nobody has written it since it was read; to be asked with the lease of the folder, before `write`."""
        return self._content() == self._was

    def write(self) -> None:
        """Write all of it (OSError)."""
        content = {"space": self._space, "trials": self._trials}
        self._folder.replace(RECORD, json.dumps(content, indent=2).encode() + b"\n")

    def _content(self) -> bytes | None:
        if self._folder.size(RECORD) is not None:
            return self._folder.read(RECORD)
        if self._folder.size("tuner.pkl") is not None:
            text = f"{self._folder.location} has a sweep of an earlier version; choose another run.name"
            raise ConfigError("run.name", text)
        return None

    def _read(self, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
            assert isinstance(found, dict)
            assert isinstance(found["space"], dict)
            assert all({"run", "values", "ended"} <= trial.keys() for trial in found["trials"].values())
        except (ValueError, KeyError, AttributeError, AssertionError, RecursionError):
            text = f"{self._folder.location}/{RECORD} is damaged: move it away, and the trials go on by their runs"
            raise ConfigError("run.name", text) from None
        return found


def runs_of(folder: Storage) -> list[str]:
    """Names of the runs of a sweep's trials.

    Args:
        folder: of the sweep.

    Raises:
        ValueError: if it is none.
    """
    try:
        found: dict[str, dict[str, str]] = json.loads(folder.read(RECORD))["trials"]
        return [trial["run"] for trial in found.values()]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        text = f"{folder.location} is not the folder of a sweep; of runs there must be two or more"
        raise ValueError(text) from None


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with another sweep; trials may be added."""
    changed = [key for key in now if before.get(key) != now[key] and key not in _MAY_CHANGE]
    if before.get("trials", 0) > now["trials"]:
        changed.append("trials")
    if changed:
        was = f"{changed[0]} was {before.get(changed[0])} and is {now[changed[0]]}"
        raise ConfigError(changed[0], f"of the sweep that this one goes on with {was}; choose another run.name")
