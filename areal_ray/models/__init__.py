"""A causal language model from config: built, its weights initialised or read, its shard units named.

Imports config and distributed.
"""

from areal_ray.models.adapters import Adapted, Adapter, build_adapted, build_adapter
from areal_ray.models.build import (
    architecture,
    attention_of,
    build_model,
    build_of_class,
    build_saved,
    check_model,
    factory_architecture,
    is_tied,
    same_architecture,
    table_sizes,
)
from areal_ray.models.fingerprint import fingerprint
from areal_ray.models.init import init_adapter, init_buffers, init_weights, materialise
from areal_ray.models.output_layer import NoOutputLayer, output_layer
from areal_ray.models.shard_units import shard_units

__all__ = [
    "Adapted",
    "Adapter",
    "NoOutputLayer",
    "architecture",
    "attention_of",
    "build_adapted",
    "build_adapter",
    "build_model",
    "build_of_class",
    "build_saved",
    "check_model",
    "factory_architecture",
    "fingerprint",
    "init_adapter",
    "init_buffers",
    "init_weights",
    "is_tied",
    "materialise",
    "output_layer",
    "same_architecture",
    "shard_units",
    "table_sizes",
]
