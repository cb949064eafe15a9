"""A sharded model with its optimizer: forward, backward, step, state. Imports models, checkpoint and distributed."""

from areal_ray.engine.base import EvalResult, SaveLoadMeta, StepResult, TrainEngine
from areal_ray.engine.frozen import FrozenShards
from areal_ray.engine.fsdp import FSDPEngine
from areal_ray.engine.hidden import Hidden
from areal_ray.engine.objectives import Batch, FrozenModel, LanguageModeling, Objective
from areal_ray.engine.state import DCPState

__all__ = [
    "Batch",
    "DCPState",
    "EvalResult",
    "FSDPEngine",
    "FrozenModel",
    "FrozenShards",
    "Hidden",
    "LanguageModeling",
    "Objective",
    "SaveLoadMeta",
    "StepResult",
    "TrainEngine",
]
