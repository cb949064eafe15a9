"""What went wrong, said once and clearly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.train import TrainingFailedError, UserCallback
from rich.console import Console
from rich.panel import Panel

from areal_ray.console import say
from areal_ray.rundir import RunDir
from areal_ray.storage import storage_at


@dataclass(frozen=True)
class Cause:
    rank: int | None
    exception: BaseException


class Reporter(UserCallback):
    """In Ray's controller: writes every failure of the workers to the ledger and the screen."""

    def __init__(self, storage_path: str, name: str) -> None:
        self._storage_path, self._name = storage_path, name

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, exception = min(worker_exceptions.items())
        text = " ".join(str(exception).split())[:200]
        say(f"worker {rank} failed ({text})")
        RunDir(storage_at(self._storage_path).sub(self._name)).event("failure", rank=rank, error=text)


def root_cause(error: TrainingFailedError) -> Cause:
    failures = getattr(error, "worker_failures", {})
    if failures:
        rank, exception = min(failures.items())
        return Cause(rank, exception)
    return Cause(None, error)


def show(error: TrainingFailedError, run: RunDir) -> None:
    cause = root_cause(error)
    Console(stderr=True).print(Panel(f"{type(cause.exception)} {cause.exception!r}", title="training failed"))
