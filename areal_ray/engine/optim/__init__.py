"""Optimizers, parameter groups, gradient norm and learning-rate schedule."""

from areal_ray.engine.optim.averages import WeightAverages
from areal_ray.engine.optim.build import build_optimizer, same_state, skips_on_device
from areal_ray.engine.optim.gradients import clip_gradients, gradient_norm
from areal_ray.engine.optim.groups import freeze, parameter_groups
from areal_ray.engine.optim.muon import MuonWithAdamW
from areal_ray.engine.optim.schedule import LrSchedule

__all__ = [
    "LrSchedule",
    "MuonWithAdamW",
    "WeightAverages",
    "build_optimizer",
    "clip_gradients",
    "freeze",
    "gradient_norm",
    "parameter_groups",
    "same_state",
    "skips_on_device",
]
