"""What the loop and the recover handler train with."""

from areal_ray.engine.base import SaveLoadMeta, TrainEngine
from areal_ray.engine.fsdp import FSDPEngine
from areal_ray.engine.state import DCPState

__all__ = ["DCPState", "FSDPEngine", "SaveLoadMeta", "TrainEngine"]
