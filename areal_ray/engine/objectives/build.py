"""The objective of a configuration."""

from __future__ import annotations

from typing import Any

from areal_ray.config import ConfigError, ObjectiveConfig, plugin
from areal_ray.engine.objectives.base import Objective
from areal_ray.engine.objectives.distillation import Distillation
from areal_ray.engine.objectives.dpo import DirectPreference
from areal_ray.engine.objectives.language_modeling import LanguageModeling, SupervisedFineTuning
from areal_ray.run.metric_names import HELD_OUT, RESERVED

# Their names stand in config/objective_rules.py as well, which imports nothing of this folder.
BUILTIN = {
    "language_modeling": LanguageModeling,
    "sft": SupervisedFineTuning,
    "dpo": DirectPreference,
    "distillation": Distillation,
}


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that the configuration names.

    Raises:
        ConfigError: if it cannot be found or made, or is none.
    """
    make = plugin.factory(config.name, "objective.name", BUILTIN)
    if not plugin.is_plugin(config.name):
        plugin.check_args(make, config.name, "objective.args", **config.args)
    made: Any = plugin.call(make, config.name, "objective.args", **config.args)
    if not isinstance(made, Objective):
        raise ConfigError(
            "objective.name", f"{config.name} gave a {type(made).__name__}, no areal_ray.engine.Objective"
        )
    if taken := [name for name in made.metrics if name in RESERVED or name.startswith(HELD_OUT)]:
        raise ConfigError(
            "objective.name", f"{config.name}: `{taken[0]}` is the name of a metric that there is already"
        )
    if stray := sorted(set(made.reference_models) - set(made.references)):
        raise ConfigError("objective.name", f"{config.name}: `{stray[0]}` of reference_models is none of `references`")
    return made
