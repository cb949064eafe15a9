"""YAML and key=value to one checked, frozen Config. Imports nothing of this package."""

from areal_ray.config.errors import ConfigError
from areal_ray.config.load import dump, load
from areal_ray.config.redact import redact, redact_override
from areal_ray.config.schema import (
    S3,
    BadStep,
    Checkpoint,
    Cluster,
    Config,
    Data,
    Engine,
    Eval,
    Fault,
    Keep,
    Logging,
    Mesh,
    Model,
    Optim,
    Run,
    Train,
    Watch,
)

__all__ = [
    "S3",
    "BadStep",
    "Checkpoint",
    "Cluster",
    "Config",
    "ConfigError",
    "Data",
    "Engine",
    "Eval",
    "Fault",
    "Keep",
    "Logging",
    "Mesh",
    "Model",
    "Optim",
    "Run",
    "Train",
    "Watch",
    "dump",
    "load",
    "redact",
    "redact_override",
]
