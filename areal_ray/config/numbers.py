"""Rules for numbers of a configuration, whatever they are for."""

from __future__ import annotations

import math
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from areal_ray.config.errors import ConfigError

_POSITIVE = (
    "train.samples",
    "train.epochs",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.seq_len",
    "train.bad_step.spike_window",
    "train.bad_step.max_bad_steps",
    "cluster.collective_timeout_s",
    "cluster.watchdog.factor",
    "cluster.watchdog.floor_s",
    "cluster.watchdog.connect_s",
    "cluster.watchdog.patience_s",
    "optim.lr",
    "optim.eps",
    "optim.warmup_samples",
    "optim.warmup_epochs",
    "optim.decay_samples",
    "optim.decay_epochs",
    "optim.clip_grad_norm",
    "optim.ema.every_steps",
    "engine.mesh.replicate",
    "engine.mesh.tensor",
    "checkpoint.every_steps",
    "checkpoint.every_seconds",
    "checkpoint.every_epochs",
    "checkpoint.memory_every_steps",
    "checkpoint.max_failed_saves",
    "checkpoint.keep.last",
    "checkpoint.keep.every_steps",
    "data.prepare_in_process_mb",
    "eval.every_steps",
    "eval.batches",
    "eval.generate.every_steps",
    "eval.generate.max_new_tokens",
    "eval.generate.top_k",
    "eval.early_stopping.patience",
    "export.every_steps",
    "export.keep",
    "export.shard_mb",
    "logging.every_steps",
    "logging.peak_tflops",
)


def check_numbers(config: Any) -> None:
    """Raise ConfigError for the first number that is not finite, has more than 64 bits or must be greater than 0.

    What stands in free arguments is for whoever they are handed to.
    """
    _check_finite(config, "")
    for key in _POSITIVE:
        value = _get(config, key)
        if value is not None and not value > 0:
            raise ConfigError(key, f"must be greater than 0, not {value}")


def _check_finite(value: Any, key: str) -> None:
    if is_dataclass(value):
        for name, hint in get_type_hints(type(value)).items():
            if get_args(hint)[-1:] != (Any,):  # arguments by name
                _check_finite(getattr(value, name), f"{key}.{name}".lstrip("."))
    elif isinstance(value, dict):
        for name, below in value.items():
            _check_finite(below, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, below in enumerate(value):
            _check_finite(below, f"{key}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, f"must be a number, not {value}")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(key, f"must be less than 2**63, not {value}")


def _get(config: Any, key: str) -> Any:
    value = config
    for name in key.split("."):
        if value is None:  # a part that is switched off
            return None
        value = getattr(value, name)
    return value
