"""Real faults in a seeded order, and what must be true of a run afterwards."""

from areal_ray.tools.chaos.main import chaos

__all__ = ["chaos"]
