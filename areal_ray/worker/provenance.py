"""Provenance of a checkpoint, for its manifest."""

from __future__ import annotations

import dataclasses
from typing import Any

import ray
import torch
import transformers

from areal_ray import __version__, models
from areal_ray.config import Config, config_hash, redact


def provenance(config: Config) -> dict[str, Any]:
    """Provenance for the manifest: config, its hash, model, tokenizer, versions and device."""
    versions = {"areal_ray": __version__, "torch": torch.__version__, "ray": ray.__version__}
    return {
        "config": redact(dataclasses.asdict(config)),
        "seed": config.run.seed,
        "model": redact(dataclasses.asdict(config.model)),
        "hf_config": models.architecture(config.model),
        "tokenizer": config.data.tokenizer,
        "config_hash": config_hash(config),
        "versions": {**versions, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if config.cluster.use_gpu else "cpu",
    }
