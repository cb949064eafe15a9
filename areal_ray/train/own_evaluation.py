"""Evaluators of one's own, named in the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from areal_ray.config import ConfigError, EvaluatorConfig, plugin
from areal_ray.data.tokenizers import Tokenizer
from areal_ray.distributed import Ranks
from areal_ray.engine import TrainEngine


@dataclass(frozen=True)
class Evaluated:
    """What an evaluator of one's own is given.

    Args:
        engine: with the model: `evaluate`, `forward`, `next_logits` and what else does not train; all of them take all
            ranks.
        tokenizer: of the data.
        ranks: all ranks.
        step: finished steps.
    """

    engine: TrainEngine
    tokenizer: Tokenizer
    ranks: Ranks
    step: int


OwnEvaluator = Callable[[Evaluated], Mapping[str, float]]


class OwnEvaluation:
    """An Evaluation by the user's code, which every rank calls equally often; what rank 0 has found counts.

    Args:
        evaluator: called with an Evaluated; returns numbers by the names of metrics.
        label: before these names, after `held_out/`.
        engine, tokenizer, ranks: for it.
        alive: called before it.
    """

    def __init__(
        self,
        evaluator: OwnEvaluator,
        label: str,
        engine: TrainEngine,
        tokenizer: Tokenizer,
        ranks: Ranks,
        alive: Callable[[], None],
    ) -> None:
        self._evaluator, self._label, self._alive = evaluator, label, alive
        self._engine, self._tokenizer, self._ranks = engine, tokenizer, ranks

    def run(self, step: int) -> Mapping[str, float]:
        self._alive()
        found = self._evaluator(Evaluated(self._engine, self._tokenizer, self._ranks, step))
        return self._ranks.on_rank_zero(lambda: self._checked(found))

    def _checked(self, found: Any) -> dict[str, float]:
        if not isinstance(found, Mapping):
            raise TypeError(f"the evaluator {self._label} returned a {type(found).__name__}, not numbers by name")
        return {f"held_out/{self._label}/{name}": float(value) for name, value in found.items()}


def build_evaluator(config: EvaluatorConfig, key: str) -> OwnEvaluator:
    """The evaluator that the configuration names.

    Raises:
        ConfigError: if it cannot be found or made, or cannot be called.
    """
    make = plugin.factory(config.name, f"{key}.name", {})
    made = plugin.call(make, config.name, f"{key}.args", **config.args)
    if not callable(made):
        raise ConfigError(f"{key}.name", f"{config.name} made a {type(made).__name__}, which cannot be called")
    found: OwnEvaluator = made
    return found
