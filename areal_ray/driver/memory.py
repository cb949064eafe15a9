"""Memory of a worker of a run, with what the configuration freezes and how it computes the loss."""

from __future__ import annotations

from collections.abc import Callable

from areal_ray import models
from areal_ray.config import Config
from areal_ray.engine import hidden
from areal_ray.engine.optim import freeze
from areal_ray.tools.doctor import MemoryEstimate, estimate


def estimator(config: Config) -> Callable[[Config, int], MemoryEstimate]:
    """The estimate of the memory of one rank of so many, for this configuration and others with the same model.

    The model is built once, on the meta device. The numbers are those of `areal-ray doctor`.
    """
    model, _ = models.build_adapted(config.model, config.adapter, config.engine.precision or "")
    freeze(model, config.optim.groups)
    units = models.shard_units(model, config.model.shard_units)
    why_not: str | None = None
    try:
        vocabulary = models.output_layer(model, units, config.engine.mesh.tensor > 1).layer.out_features
    except models.NoOutputLayer as error:
        why_not, vocabulary = str(error), 0

    def needs(changed: Config, workers: int) -> MemoryEstimate:
        chunked = why_not is None and hidden.choose(changed, vocabulary, why_not) == "chunked"
        return estimate(changed, workers, model, chunked)

    return needs
