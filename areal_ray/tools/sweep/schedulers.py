"""Ray Tune's schedulers as a sweep takes them: by steps of the runs, and with what was known before a restart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from areal_ray.tools.sweep.draw import clamp, kinds
from areal_ray.tools.sweep.space import Sweep

History = Mapping[str, Sequence[Mapping[str, Any]]]


def build(space: Sweep, steps: int, history: History) -> TrialScheduler:
    """The scheduler of a sweep.

    Args:
        space: of the sweep.
        steps: of the longest trial.
        history: evaluations of earlier starts, oldest first, by the trial's name.
    """
    if space.scheduler == "asha":
        limits = {"grace_period": space.grace_steps, "reduction_factor": space.reduction_factor}
        # Beyond the last step: a trial that gets there ends by itself.
        return Halving(history, time_attr="step", max_t=max(steps, space.grace_steps) + 1, **limits)
    if space.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=space.perturb_steps,
            burn_in_period=space.grace_steps,
            hyperparam_mutations={"trial": {"values": {key: _mutations(*what) for key, what in kinds(space).items()}}},
            quantile_fraction=space.quantile,
            custom_explore_fn=_Explore(space),
            log_config=False,
            require_attrs=False,  # as the end of a trial that was not evaluated
        )
    return FIFOScheduler()


@dataclass(frozen=True)
class _Named:
    """All that ASHA asks of a trial: Tune gives it another id at every start, its name stays."""

    trial_id: str


class Halving(ASHAScheduler):
    """Ray's asynchronous successive halving, that remembers.

    Tune forgets, when a sweep goes on, what trials of earlier starts had reached, and the next ones would be compared
    with nothing.

    Args:
        history: evaluations of earlier starts, oldest first, by the trial's name. They count as judged.
        options: of ASHA.
    """

    def __init__(self, history: History, **options: Any) -> None:
        super().__init__(**options)
        self._history = dict(history)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        for name, lines in self._history.items():
            super().on_trial_add(tune_controller, _Named(name))
            for line in lines:
                super().on_trial_result(tune_controller, _Named(name), dict(line))
        self._history = {}
        super().on_trial_add(tune_controller, _Named(str(trial)))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        return super().on_trial_result(tune_controller, _Named(str(trial)), result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, _Named(str(trial)), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, _Named(str(trial)))


class _Explore:
    """Keeps what pbt makes of the better trial's values in their ranges, and notes whose they were."""

    def __init__(self, space: Sweep) -> None:
        self._space = space

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        trial = config["trial"]
        return {**config, "trial": {**trial, "values": clamp(self._space, trial["values"])}}


def _mutations(kind: str, values: list[Any]) -> Any:
    if kind in ("grid", "choice"):
        return list(values)
    low, high = float(values[0]), float(values[1])
    if kind == "int_uniform":
        return tune.randint(int(low), int(high) + 1)
    return tune.loguniform(low, high) if kind == "log_uniform" else tune.uniform(low, high)
