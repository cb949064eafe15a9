"""YAML and key=value to one checked, frozen Config. Imports nothing of this package."""

from areal_ray.config.data_schema import DataConfig, MixtureConfig, SourceConfig
from areal_ray.config.errors import ConfigError
from areal_ray.config.eval_schema import (
    EarlyStoppingConfig,
    EvalConfig,
    EvalSetConfig,
    EvaluatorConfig,
    ExportConfig,
    GenerateConfig,
)
from areal_ray.config.lengths import in_steps
from areal_ray.config.load import config_hash, dump, load
from areal_ray.config.model_schema import ModelConfig, NameConfig
from areal_ray.config.redact import redact, redact_override
from areal_ray.config.schema import (
    EVALUATION,
    AdapterConfig,
    BadStepConfig,
    CheckpointConfig,
    ClusterConfig,
    Config,
    EmaConfig,
    EngineConfig,
    Fault,
    KeepConfig,
    LoggingConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimConfig,
    ParameterGroupConfig,
    RunConfig,
    S3Config,
    TrackerConfig,
    TrainConfig,
    WatchdogConfig,
)
from areal_ray.config.types import Recomputed

__all__ = [
    "EVALUATION",
    "AdapterConfig",
    "BadStepConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EarlyStoppingConfig",
    "EmaConfig",
    "EngineConfig",
    "EvalConfig",
    "EvalSetConfig",
    "EvaluatorConfig",
    "ExportConfig",
    "Fault",
    "GenerateConfig",
    "KeepConfig",
    "LoggingConfig",
    "MeshConfig",
    "MixtureConfig",
    "ModelConfig",
    "NameConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParameterGroupConfig",
    "Recomputed",
    "RunConfig",
    "S3Config",
    "SourceConfig",
    "TrackerConfig",
    "TrainConfig",
    "WatchdogConfig",
    "config_hash",
    "dump",
    "in_steps",
    "load",
    "redact",
    "redact_override",
]
