"""The end of a run: its last event, result.json, report.html, what is said of it, and who is told."""

from __future__ import annotations

from typing import Any

from areal_ray.checkpoint import Catalog
from areal_ray.driver.on_end import tell_end
from areal_ray.run import RunDir
from areal_ray.run.directory import REPORT
from areal_ray.run.goodput import History, account, history, table
from areal_ray.tools.report import page, read_course


class Ending:
    """Writes down and tells how a run has ended.

    Args:
        run: the run directory.
        on_end: see `areal_ray.driver.on_end.tell_end`.
    """

    def __init__(self, run: RunDir, on_end: str | None = None) -> None:
        self._run, self._on_end = run, on_end
        self._result: dict[str, Any] | None = None  # None: it has not ended yet

    def close(self, status: str, outcome: dict[str, Any], **fields: Any) -> tuple[dict[str, Any], History | None]:
        """Write the last event, result.json and report.html.

        Args:
            status: finished, stopped, interrupted or failed.
            outcome: of the workers, as far as they had one.
            fields: of the event.

        Returns:
            The result, and the course of the run if it could be read.

        Raises:
            RunTaken: if the run is another job's by now.
        """
        run = self._run
        run.note(status, print, **fields)
        empty: dict[str, Any] = {"step": 0, "loss": None, "restarts": 0, "checkpoint": None}
        result, past = {"status": status, **empty, **outcome}, None
        try:
            past = history(run)
            result = _result(run, status, outcome, past)
            run.write_result(result)
        except OSError as error:
            print(f"could not write result.json: {error}", flush=True)
        self._report()
        self._result = result
        return result, past

    def interrupted(self) -> int:
        """Close a run that was asked to leave; the exit status."""
        checkpoint = self.close("interrupted", {})[0]["checkpoint"]
        print(f"interrupted; the same command goes on from {checkpoint or 'the beginning'}", flush=True)
        return 130

    def finished(self, status: str, outcome: dict[str, Any]) -> str | None:
        """Close a run whose workers have come to their end, and sum it up; its newest checkpoint."""
        result, past = self.close(status, outcome, step=outcome["step"])
        _summary(self._run, result, past)
        checkpoint: str | None = result["checkpoint"]
        return checkpoint

    def tell(self) -> None:
        """Have on_end called, if the run has ended: the last thing that is done."""
        if self._result is not None:
            tell_end(self._on_end, self._result, self._run.storage.location, lambda text: print(text, flush=True))

    def _report(self) -> None:
        try:
            self._run.write_report(page([read_course(self._run)]))
        except Exception as error:  # noqa: BLE001  (a picture of the run, whose outcome must not depend on it)
            print(f"could not write report.html: {type(error).__name__}: {error}", flush=True)


def _result(run: RunDir, status: str, outcome: dict[str, Any], past: History) -> dict[str, Any]:
    newest = Catalog(run.storage).newest()
    attempts = [event for event in past.events if event["event"] == "attempt"]
    submitted = sum(event["event"] == "submitted" for event in past.events)
    planned = sum(event["event"] == "left" and event["reason"] != "stop" for event in past.events)
    return {
        "status": status,
        "step": outcome.get("step", newest.step if newest else 0),
        "loss": outcome.get("loss"),
        "world_size": outcome.get("world_size", attempts[-1].get("world_size") if attempts else None),
        "restarts": max(0, len(attempts) - submitted - planned),
        "checkpoint": newest.name if newest else None,
        "goodput": account(past),
    }


def _summary(run: RunDir, result: dict[str, Any], past: History | None) -> None:
    n = result["restarts"]
    loss = "" if result["loss"] is None else f"loss {result['loss']:.4f}, "  # None: the last step was left out
    print(f"{result['status']}: step {result['step']}, {loss}{n} restart{'s' * (n != 1)}")
    if past is not None:
        _summarize(past, n)
    print(f"checkpoint: {run.storage.location}/{result['checkpoint']}")
    print(f"report: {run.storage.location}/{REPORT}", flush=True)


def _summarize(past: History, restarts: int) -> None:
    if len(past.held_out) > 1:
        (first_step, first), (last_step, last) = past.held_out[0], past.held_out[-1]
        print(f"held-out loss: {first:.4f} at step {first_step}, {last:.4f} at step {last_step} ({last / first:.0%})")
    spent = account(past)
    if spent["share"] is not None:
        seconds = f"{spent['steps_s']:.0f} of {spent['wall_s']:.0f} s"
        print(f"goodput: {spent['share']:.0%} of the time went into steps that count ({seconds})")
    if restarts:
        print(f"where starts took their time, in seconds:\n{table(spent)}")


def has_no_checkpoint(run: RunDir) -> bool:
    """Whether this process sees none: then nobody can go on, whatever the workers said. Not if storage is away."""
    try:
        return Catalog(run.storage).last_committed() is None
    except OSError:
        return False
