"""Reports of worker failures, written from Ray Train's controller as they are noticed; with its public API only."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from areal_ray.cluster.console import leave_out_marks, say
from areal_ray.cluster.failures import detection_s, hung_cause, root_cause, step_of
from areal_ray.cluster.requests import is_planned, taken_over
from areal_ray.run import RunDir


class Reporter(UserCallback):
    """Tells of every failure of the workers when it is noticed; a callback of Ray's controller.

    Args:
        run: the run directory.
        marks: as `cluster.console.leave_out_marks` explains.
    """

    def __init__(self, run: RunDir, marks: bool = True) -> None:
        self._run, self._marks = run, marks

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if not self._marks:
            leave_out_marks()
        if is_planned(worker_exceptions) or taken_over(worker_exceptions.values()):
            return
        try:
            self._report(worker_exceptions)
        except Exception as error:  # noqa: BLE001  (raised here it would take the place of the workers' own)
            say(f"could not write down a failure: {type(error).__name__}: {error}")

    def _report(self, worker_exceptions: dict[int, Exception]) -> None:
        run, cause = self._run, root_cause(worker_exceptions)
        try:
            cause = hung_cause(run, worker_exceptions) or cause
        except OSError as error:
            say(f"could not read the ledger: {error}")
        say(f"worker {cause.rank} failed: {cause.kind}: {cause.message[:200]}")
        fields = {"rank": cause.rank, "cause": cause.kind, "error": cause.message[:500], "where": cause.where}
        seen = {"ranks": sorted(worker_exceptions), "step": step_of(worker_exceptions, lambda: run)}
        run.note("failure", say, **fields, **seen, detection_s=detection_s(worker_exceptions))
