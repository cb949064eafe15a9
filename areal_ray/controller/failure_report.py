"""Reports of worker failures, written from Ray Train's controller as they are noticed."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from areal_ray.cluster.console import say
from areal_ray.cluster.failures import _detection_s, _hung, root_cause, step_of
from areal_ray.cluster.requests import is_planned
from areal_ray.run import RunDir


class Reporter(UserCallback):
    """Runs in Ray's controller: tells of every failure of the workers when it is noticed.

    Args:
        run: the run directory.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if is_planned(worker_exceptions):
            return
        try:
            self._report(worker_exceptions)
        except Exception as error:  # noqa: BLE001  (raised here it would take the place of what the workers raised)
            say(f"could not write down a failure: {type(error).__name__}: {error}")

    def _report(self, worker_exceptions: dict[int, Exception]) -> None:
        run, cause = self._run, root_cause(worker_exceptions)
        try:
            cause = _hung(run, worker_exceptions) or cause
        except OSError as error:
            say(f"could not read the ledger: {error}")
        say(f"worker {cause.rank} failed: {cause.kind}: {cause.message[:200]}")
        what = {"rank": cause.rank, "cause": cause.kind, "error": cause.message[:500], "where": cause.where}
        seen = {"ranks": sorted(worker_exceptions), "step": step_of(worker_exceptions, lambda: run)}
        run.note("failure", say, **what, **seen, detection_s=_detection_s(worker_exceptions))
