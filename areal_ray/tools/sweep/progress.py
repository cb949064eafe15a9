"""Lines about the trials of a sweep, instead of Tune's tables, and the record of how far they are."""

from __future__ import annotations

from typing import Any

from ray import tune

from areal_ray.tools.sweep.record import Record


class Progress(tune.Callback):
    """Prints a line for each evaluation and each end of a trial, and has both recorded.

    Args:
        metric: by which trials are judged.
        record: of the sweep.
    """

    def __init__(self, metric: str, record: Record) -> None:
        self._metric, self._record = metric, record
        self._seen: dict[str, tuple[str, int]] = {}  # run and step of the last line, by trial

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name, own = str(trial), trial.config["trial"]
        values = ", ".join(f"{key}={_short(value)}" for key, value in own["values"].items())
        if own["name"] != name:
            print(f"trial {name} goes on from where {own['name']} is, with {values}", flush=True)
        else:
            begun = own["seen"] >= 0 or name in self._seen
            print(f"trial {name} {'goes on' if begun else 'begins'}: {values}", flush=True)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if self._metric not in result:
            return
        name, run, step = str(trial), result["run"], result["step"]
        self._record.note(name, run, trial.config["trial"]["values"])
        before = self._seen.get(name, ("", -1))
        if run != before[0] or step > before[1]:  # not what is told again after a failure, or as its end
            print(f"trial {name}: step {step}, {self._metric} {result[self._metric]:.4f}", flush=True)
        self._seen[name] = run, step

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        last = trial.last_result or {}
        self._record.end(str(trial), last.get("step"), last.get(self._metric))
        print(f"trial {trial} ends{_where(last)}", flush=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        print(f"trial {trial} failed{_where(trial.last_result or {})}", flush=True)


def _where(last: dict[str, Any]) -> str:
    return f" at step {last['step']}" if "step" in last else ""


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
