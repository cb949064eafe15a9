"""Context of a job, known to each of its processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from areal_ray.run.directory import RunDir
from areal_ray.run.versions import versions


@dataclass(frozen=True)
class JobContext:
    """One submission of a run; pickled into every process of the job.

    Args:
        run: the run directory.
        submission: unique to this submission, so that requests to an earlier one are not heard.
        fast_restarts: whether Ray's internals are used, for restarts in seconds; else its public API alone.
        search_path: folders with the user's own code, see `areal_ray.config.plugin`.
        operations_per_token: of the model, see `areal_ray.models.operations`; None: not known.
        live: whether the driver shows a line that changes in its place, and wants to hear of every step.
        serving: what manifests say for who uses the model later, see `driver.preflight.serving`.
        versions: of the driver, as `areal_ray.run.versions` has them.
    """

    run: RunDir
    submission: str
    fast_restarts: bool = True
    search_path: tuple[str, ...] = ()
    operations_per_token: float | None = None
    live: bool = False
    serving: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
