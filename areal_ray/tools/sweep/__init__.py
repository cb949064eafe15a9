"""Sweeps: many runs of one experiment, on Ray Tune."""

from areal_ray.tools.sweep.main import SweepFolder, sweep
from areal_ray.tools.sweep.space import Sweep, read_sweep

__all__ = ["Sweep", "SweepFolder", "read_sweep", "sweep"]
