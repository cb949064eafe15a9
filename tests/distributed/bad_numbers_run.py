"""One attempt of the real loop with a real engine, without Ray."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from areal_ray.checkpoint import AsyncWriter, Catalog
from areal_ray.config import Fault, KeepConfig
from areal_ray.distributed import Ranks
from areal_ray.engine import FSDPEngine
from areal_ray.engine.objectives import LanguageModeling
from areal_ray.storage import LocalStorage
from tests.distributed.small import (
    SEQ_LEN,
    VOCABULARY,
    small_config,
    snapshot,
)

if TYPE_CHECKING:
    from areal_ray.train.cadence import AutoCadence

STEPS, BAD, EVERY = 6, 4, 3


class SlowStorage(LocalStorage):
    """A checkpoint is committed a while after its save began."""

    def sub(self, name: str) -> LocalStorage:
        return SlowStorage(self._inside(name))

    def publish(self, name: str, data: bytes) -> None:
        time.sleep(1.0)
        super().publish(name, data)


class Run:
    """One attempt of the real loop: everything that a worker wires, without Ray."""

    def __init__(
        self, root: str, *overrides: str, attempt: int = 1, fault: Fault | None = None, auto: AutoCadence | None = None
    ) -> None:
        # Here, so that this module can be collected where there is a torch but no grain and no Ray.
        from areal_ray.data import PackedTokens
        from areal_ray.run import RunDir
        from areal_ray.train.faults import Faults
        from areal_ray.train.journal import Journal, TunedSaves, retention
        from areal_ray.train.recovery import RecoverHandler, SavePolicy
        from areal_ray.worker.job import Data, build_job
        from areal_ray.worker.start import Start

        config = small_config(
            f"train.steps={STEPS}",
            f"checkpoint.every_steps={EVERY}",
            "eval.every_steps=null",
            "logging.every_steps=2",
            *overrides,
        )
        self.engine = FSDPEngine(config)
        self.engine.initialize()
        self.ranks = Ranks()
        self.run = RunDir(SlowStorage(root))
        self.faults = Faults([fault] if fault else [], self.run, self.ranks)
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, 20 * SEQ_LEN)
        data = PackedTokens(tokens, SEQ_LEN)
        self.began: list[int] = []
        start = Start(attempt, self.run, self.ranks, lambda text: None, Catalog(self.run.storage))
        here = self.run if start.first else None
        kept = retention(self.run, attempt, start.say, start.catalog, KeepConfig())
        journal = Journal(here, attempt, start.say, kept)
        heard = TunedSaves(auto, journal, self.ranks) if auto else journal
        writer = AsyncWriter(self.ranks, Ranks(dist.new_group(backend="gloo")))
        info = {**self.engine.describe(), "config": {}}
        self.job, self.restore = build_job(
            config,
            start,
            self.engine,
            Data(data, data),
            self.faults.spoiling(LanguageModeling()),
            self,
            lambda state: RecoverHandler(start.catalog, state, writer, heard, attempt, info, self.ranks, SavePolicy()),
            journal,
            RuntimeError,
            auto,
        )
        self.restored: list[tuple[str | None, dict[str, torch.Tensor]]] = []
        self.weights: dict[int, list[dict[str, torch.Tensor]]] = {}  # before each step, each time
        roll_back = self.job.roll_back

        def noted() -> bool:
            back = roll_back()
            self.restored.append((Catalog.name(self.job.progress.step, attempt), snapshot(self.engine)))
            return back

        self.job.roll_back = noted

    def before_step(self, step: int) -> None:
        self.faults.before_step(step)
        self.began.append(step)
        self.weights.setdefault(step, []).append(snapshot(self.engine))

    def enter(self, phase): ...

    def leaving(self) -> bool:
        return False

    def check(self) -> None: ...

    def saving(self, dump: Any, metrics: dict[str, float]) -> None: ...

    def train(self) -> Run:
        from areal_ray.train import loop

        loop.train(self.job)
        return self

    def standing(self) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
        return snapshot(self.engine), self.job.bad_steps.state_dict(), self.job.progress.state_dict()
