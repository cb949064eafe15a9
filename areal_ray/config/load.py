"""From an experiment's files and overrides to a frozen Config, and back to YAML.

Values come from, later ones winning: the defaults of schema.py, the groups that the experiment's `defaults:` list names
(conf/model, conf/data, conf/cluster), the experiment itself, `key=value` on the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import asdict

from omegaconf import OmegaConf

from areal_ray.config.errors import ConfigError
from areal_ray.config.layers import compose, read_layers, source_of
from areal_ray.config.redact import redact
from areal_ray.config.rules import check
from areal_ray.config.schema import Config, RunConfig


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment.

    Args:
        path: YAML file, usually in conf/experiments/.
        overrides: "key=value" strings; dotted keys, values in YAML.

    Raises:
        ConfigError: one line that names the file (or "command line"), the key and what would be right.
    """
    layers = read_layers(path, overrides, Config)
    config = compose(Config, layers)
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(error.key, error.message, source_of(error.key, layers)) from None
    return config


def dump(config: Config) -> str:
    """The config as YAML that `load` reads back; values of keys that name a secret are replaced by `***`."""

    return OmegaConf.to_yaml(OmegaConf.create(redact(asdict(config))))


def config_hash(config: Config) -> str:
    """A hash of all that lasts: with another name, place, fault or end of this invocation it is the same."""
    lasting = dataclasses.replace(
        config,
        run=RunConfig(seed=config.run.seed),
        train=dataclasses.replace(config.train, stop_at=None),
        faults=[],
    )
    return hashlib.sha256(dump(lasting).encode()).hexdigest()[:16]
