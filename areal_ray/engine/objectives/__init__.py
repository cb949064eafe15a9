"""Objectives: losses of a model's output, each with its weight. The seam, those of this package, and their parts."""

from areal_ray.engine.objectives.base import Batch, FrozenModel, LossFn, LossWeightFn, Objective, split
from areal_ray.engine.objectives.build import BUILTIN, build_objective
from areal_ray.engine.objectives.distillation import Distillation
from areal_ray.engine.objectives.dpo import DirectPreference
from areal_ray.engine.objectives.language_modeling import FunctionObjective, LanguageModeling, SupervisedFineTuning
from areal_ray.engine.objectives.text import (
    IGNORED,
    labels_of,
    next_token_loss,
    predicted_tokens,
    regularised_loss,
    text_inputs,
    token_log_probs,
)

__all__ = [
    "BUILTIN",
    "IGNORED",
    "Batch",
    "DirectPreference",
    "Distillation",
    "FrozenModel",
    "FunctionObjective",
    "LanguageModeling",
    "LossFn",
    "LossWeightFn",
    "Objective",
    "SupervisedFineTuning",
    "build_objective",
    "labels_of",
    "next_token_loss",
    "predicted_tokens",
    "regularised_loss",
    "split",
    "text_inputs",
    "token_log_probs",
]
