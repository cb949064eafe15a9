"""Rules of the objective: whether the data have what it is a loss of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from areal_ray.config.errors import ConfigError
from areal_ray.config.plugin import is_plugin

if TYPE_CHECKING:
    from areal_ray.config import Config

OBJECTIVES = (
    "language_modeling",
    "sft",
    "dpo",
    "distillation",
)  # areal_ray/engine/objectives/build.py has their classes

_METRICS = {  # of their classes, beside the loss
    "dpo": (
        *("reward_chosen", "reward_rejected", "reward_accuracy", "reward_margin"),
        *("log_prob_chosen", "log_prob_rejected"),
    ),
    "distillation": ("cross_entropy", "divergence"),
}


def metrics_of(config: Config) -> tuple[str, ...]:
    """Names of the means that an objective of this package gives beside the loss."""
    objective = config.objective
    regularised = any(objective.args.get(name) for name in ("z_loss", "label_smoothing"))
    nll = ("nll",) if regularised and objective.name in ("language_modeling", "sft") else ()
    return (*_METRICS.get(objective.name, ()), *nll)


def check_objective(config: Config) -> None:
    """Raise ConfigError if the rows of the data are not those of the objective. Of one's own data nothing is known."""
    name, data = config.objective.name, config.data
    if is_plugin(data.source):
        return
    formats = {source.format for source in data.sources.values()}
    if name == "dpo" and formats != {"preference"}:
        text = f"dpo compares a chosen with a rejected answer, which records of {_listed(formats)} have not"
        raise ConfigError("objective.name", f"{text}: data.format=preference data.packing=none")
    if name == "sft" and formats == {"text"}:
        text = "sft predicts answers, and in text there are none: data.format=messages or completion"
        raise ConfigError("objective.name", f"{text}; language_modeling predicts every token")


def _listed(formats: Iterable[str]) -> str:
    return " and ".join(f"data.format={name}" for name in sorted(formats))
