"""Lines about the trials of a sweep, instead of Tune's tables."""

from __future__ import annotations

from typing import Any

from ray import tune

from areal_ray.tools.sweep.space import Sweep


class Progress(tune.Callback):
    """Prints a line for each evaluation and each end of a trial.

    Args:
        space: of the sweep.
    """

    def __init__(self, space: Sweep) -> None:
        self._metric, self._keys = space.metric, list(space.space)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        values = ", ".join(f"{key}={_short(trial.config[key])}" for key in self._keys)
        print(f"trial {trial.trial_id} begins: {values}", flush=True)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if self._metric in result:
            print(
                f"trial {trial.trial_id}: step {result['step']}, {self._metric} {result[self._metric]:.4f}", flush=True
            )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        print(f"trial {trial.trial_id} ends", flush=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        print(f"trial {trial.trial_id} failed", flush=True)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
