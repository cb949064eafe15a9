"""A run's directory: event log, metrics, result, goodput, and who may write. Imports config and storage."""

from areal_ray.run.directory import RunDir

__all__ = ["RunDir"]
