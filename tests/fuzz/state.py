"""The state of a job as a worker wires it, without an engine: what is saved as a seed and restored by each case."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from areal_ray.checkpoint import Catalog, SyncWriter
from areal_ray.config import BadStepConfig, load
from areal_ray.data import GlobalBatches
from areal_ray.distributed import Ranks
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.train.bad_steps import BadStepPolicy
from areal_ray.train.cadence import Cadence
from areal_ray.train.journal import Journal
from areal_ray.train.loop import Progress
from areal_ray.train.recovery import RecoverHandler, SavePolicy
from areal_ray.train.restore import Restore
from areal_ray.train.tracking import StepMetrics

ROOT = Path(__file__).resolve().parents[2]
CONFIG = load(str(ROOT / "conf/experiments/tiny.yaml"))
SAMPLES_PER_STEP = 8


class Tokens:
    """A data set of rows that nobody reads."""

    fingerprint = "0123456789abcdef"

    def __len__(self) -> int:
        return 64

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"input_ids": np.zeros((len(indices), 4), np.int64)}


class Engine:
    """Tensors and a schedule, as the engine's state has them."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors, self.step = tensors, 0

    def state_dict(self) -> dict[str, Any]:
        return {**self.tensors, "schedule": {"step": self.step, "lr": self.step * 1e-3}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["schedule"]["step"]


@dataclass
class Job:
    """What is saved and restored.

    Args:
        engine: its tensors may be DTensors.
    """

    engine: Engine
    cursor: GlobalBatches = field(
        default_factory=lambda: GlobalBatches(Tokens(), 0, SAMPLES_PER_STEP, 0, 1)  # type: ignore[arg-type]
    )
    progress: Progress = field(default_factory=Progress)
    metrics: StepMetrics = field(default_factory=lambda: StepMetrics(Cadence(1), [], 100, 32))
    guard: BadStepPolicy = field(default_factory=lambda: BadStepPolicy(BadStepConfig(), [], lambda _: None))

    @property
    def state(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "data": self.cursor,
            "progress": self.progress,
            "tracker": self.metrics,
            "evaluate": Cadence(10),
            "save": Cadence(10),
            "guard": self.guard,
        }

    def go_to(self, step: int) -> None:
        self.engine.step = self.progress.step = step
        self.cursor.next_sample = self.progress.samples = step * SAMPLES_PER_STEP
        self.progress.metrics = {"loss": 5.5 - step}

    def recover(self, run: RunDir, attempt: int, info: dict[str, Any], say: Any) -> RecoverHandler:
        journal = Journal(run, attempt, say)
        catalog, writer = Catalog(run.storage), SyncWriter(Ranks())
        return RecoverHandler(catalog, self.state, writer, journal, attempt, info, Ranks(), SavePolicy())


def restore_run(folder: Path, job: Job, said: list[str]) -> None:
    """A start of the workers on a run directory: an attempt of its own, the newest good state, its receipt."""
    run = RunDir(LocalStorage(folder))
    attempt = run.next_attempt(Catalog(run.storage).last_attempt())
    recover = job.recover(run, attempt, {"world_size": 1, "mesh": {"shard": 1}}, said.append)
    Restore(
        run, attempt, recover, job.progress, job.metrics, Ranks(), said.append, lambda reason: RuntimeError(reason)
    ).at_start("1 worker on cpu")


def contents(job: Job) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Bits of the tensors, by name; the values that do not change with the clock."""
    tensors = {
        f"{section}.{name}": _bits(tensor)
        for section, below in job.engine.tensors.items()
        for name, tensor in below.items()
    }
    place = {"step": job.engine.step, "data": job.cursor.next_sample, "progress": job.progress.state_dict()}
    return tensors, {**place, "guard": job.guard.state_dict()}


def _bits(tensor: torch.Tensor) -> bytes:
    whole = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return whole.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
