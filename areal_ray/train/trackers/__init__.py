"""Trackers: where people look at their runs. Each needs its own library, and is imported only if it is asked for."""

from areal_ray.train.trackers.build import build_tracker, check_tracker
from areal_ray.train.trackers.follower import Follower
from areal_ray.train.trackers.subject import Subject

__all__ = ["Follower", "Subject", "build_tracker", "check_tracker"]
