"""The context of a job, handed to each of its processes."""

from __future__ import annotations

from dataclasses import dataclass

from areal_ray.run.directory import RunDir


@dataclass(frozen=True)
class JobContext:
    """One submission of a run; pickled into every process of the job.

    Args:
        run: the run directory.
        submission: unique to this submission, so that what was asked of an earlier one is not heard.
    """

    run: RunDir
    submission: str
