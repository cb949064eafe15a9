"""MLflow, on a tracking server or in a folder."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag

from areal_ray.config import redact
from areal_ray.train.trackers.subject import Subject

_ID = "areal_ray.id"
_BATCH = 100  # parameters in one request, at most
_LONGEST = 500  # characters of a parameter's value, on the older of its stores


class MLflow:
    """A run in MLflow, the same one across restarts and submissions, found by a tag.

    It takes no step back, see `WandB`.

    Args:
        subject: the run.
        tracking_uri: default the environment's MLFLOW_TRACKING_URI, else a database in the run directory.
        experiment: name of the experiment.
    """

    def __init__(self, subject: Subject, tracking_uri: str | None = None, experiment: str = "areal_ray") -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells at length how it makes a database
        place = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(place or _database(subject.folder_for("mlflow.db", "tracking_uri")))
        found = self._client.get_experiment_by_name(experiment)
        group = found.experiment_id if found else self._client.create_experiment(experiment)
        runs = self._client.search_runs([group], f"tags.`{_ID}` = '{subject.id}'")
        tags = {_ID: subject.id, "revision": subject.revision, "run_directory": subject.location}
        run = runs[0] if runs else self._client.create_run(group, run_name=subject.name, tags=tags)
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        params = {key: str(value)[:_LONGEST] for key, value in redact(_flat(subject.config)).items()}
        new = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        for first in range(0, len(new), _BATCH):
            self._client.log_batch(self._id, params=new[first : first + _BATCH])
        history = self._client.get_metric_history(self._id, "step") if runs else []
        self._last = max((metric.step for metric in history), default=-1)

    def rewind(self, step: int) -> int:
        """Take back nothing; the last step that there is."""
        return self._last

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now, numbers = round(time.time() * 1000), {**values, "step": step}
        self._client.log_batch(self._id, metrics=[Metric(k, float(v), now, step) for k, v in numbers.items()])
        self._last = step

    def event(self, event: Mapping[str, Any]) -> None:
        shown = ", ".join(f"{name} {event[name]}" for name in ("attempt", "step", "checkpoint") if name in event)
        self._client.log_batch(self._id, tags=[RunTag(f"last_{event['event']}", shown)])

    def close(self) -> None:
        self._client.set_terminated(self._id, RunStatus.to_string(RunStatus.FINISHED))


def _database(path: str) -> str:
    """The URI of a database in a file, made if it is not there.

    Making one takes MLflow seconds, and half of one could not be used: it gets its name when it is whole.
    """
    if not os.path.exists(path):
        unfinished = f"{path}.{secrets.token_hex(4)}.tmp"
        MlflowClient(f"sqlite:///{unfinished}").search_experiments()
        os.replace(unfinished, path)
    return f"sqlite:///{path}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
