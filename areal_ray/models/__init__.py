"""Build a causal language model, name the parts that are sharded one by one, initialise it."""

from areal_ray.models.build import architecture, build_model, check_model, same_architecture
from areal_ray.models.init import init_buffers, init_weights, materialise
from areal_ray.models.shard_units import shard_units

__all__ = [
    "architecture",
    "build_model",
    "check_model",
    "init_buffers",
    "init_weights",
    "materialise",
    "same_architecture",
    "shard_units",
]
