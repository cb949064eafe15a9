"""The report of a run: one HTML file with its curves, restarts, checkpoints, failures and configuration."""

from areal_ray.tools.report.course import Course, read_course
from areal_ray.tools.report.page import page

__all__ = ["Course", "page", "read_course"]
