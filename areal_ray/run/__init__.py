"""A run's directory: event log, metrics, result, goodput, and who may write. Imports config and storage."""

from areal_ray.run.directory import RunDir
from areal_ray.run.job_context import JobContext

__all__ = ["JobContext", "RunDir"]
