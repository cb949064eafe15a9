"""Build a causal language model, name the parts that are sharded one by one, initialise it."""

from areal_ray.models.build import build_model, check_model
from areal_ray.models.init import init_buffers, init_weights, materialise
from areal_ray.models.units import shard_units

__all__ = ["build_model", "check_model", "init_buffers", "init_weights", "materialise", "shard_units"]
