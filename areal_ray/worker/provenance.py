"""Provenance of a checkpoint, for its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import ray
import torch
import transformers

from areal_ray import __version__, models
from areal_ray.config import Config, RunConfig, dump, redact


def provenance(config: Config) -> dict[str, Any]:
    """Provenance for the manifest: config, its hash, model, tokenizer, versions and device."""
    # An experiment with another name, place, fault or end of this invocation has the same hash.
    lasting = dataclasses.replace(
        config,
        run=RunConfig(seed=config.run.seed),
        train=dataclasses.replace(config.train, stop_at=None),
        faults=[],
    )
    versions = {"areal_ray": __version__, "torch": torch.__version__, "ray": ray.__version__}
    return {
        "config": redact(dataclasses.asdict(config)),
        "seed": config.run.seed,
        "model": redact(dataclasses.asdict(config.model)),
        "hf_config": models.architecture(config.model),
        "tokenizer": config.data.tokenizer,
        "config_hash": hashlib.sha256(dump(lasting).encode()).hexdigest()[:16],
        "versions": {**versions, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if config.cluster.use_gpu else "cpu",
    }
