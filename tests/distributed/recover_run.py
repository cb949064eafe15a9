"""An attempt of a run, with a clock that its test turns: engine, data cursor, progress and RecoverHandler."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch.distributed as dist

from areal_ray.checkpoint import AsyncWriter, Catalog, CheckpointWriter, SyncWriter
from areal_ray.distributed import Ranks
from areal_ray.storage import LocalStorage
from areal_ray.train.cadence import Cadence
from areal_ray.train.recovery import PendingSave, RecoverHandler, SavePolicy
from tests.distributed.small import GLOBAL_BATCH, SEQ_LEN, VOCABULARY, one_step, snapshot, start_engine

LAST = 6
SAVES = (2, 4)


class Heard:
    """A Journal: what was said to it."""

    def __init__(self) -> None:
        self.saves: list[tuple[str, bool]] = []
        self.passed: list[tuple[str, str]] = []

    def begins(self, checkpoint: str, step: int) -> None: ...

    def saved(self, dump: PendingSave, blocked_s: float, waited_s: float, total_s: float) -> None:
        self.saves.append((dump.name, dump.manifest.exception() is None))

    def skipped(self, step: int) -> None:
        raise AssertionError("no save is to fall out here")

    def passed_over(self, checkpoint: str, reason: str) -> None:
        self.passed.append((checkpoint, reason))


class Run:
    """One attempt: everything that a worker wires for training, with a clock of its own that the test turns."""

    def __init__(self, root: str, attempt: int, data_seed: int = 0, background: bool = False) -> None:
        # Here, so that this module can be collected where there is a torch but no grain.
        from areal_ray.data import GlobalBatches, PackedTokens
        from areal_ray.train.loop import Progress

        self.engine = start_engine("train.steps=6")
        self.ranks = Ranks()
        # 20 sequences in batches of 8: the third batch reaches into the second epoch.
        tokens = np.random.default_rng(data_seed).integers(0, VOCABULARY, 20 * SEQ_LEN)
        self.batches = GlobalBatches(
            PackedTokens(tokens, SEQ_LEN), 0, GLOBAL_BATCH, self.ranks.rank, self.ranks.size, self.engine.device
        )
        self.progress = Progress()
        self.now = 0.0
        self.save = Cadence(steps=2, seconds=30, agree=self.ranks.agree, clock=lambda: self.now)
        self.heard = Heard()
        writer: CheckpointWriter = SyncWriter(self.ranks)
        if background:
            writer = AsyncWriter(self.ranks, Ranks(dist.new_group(backend="gloo")))
        self.recover = RecoverHandler(
            Catalog(LocalStorage(root)),
            {"engine": self.engine.state, "data": self.batches, "progress": self.progress, "save": self.save},
            writer,
            self.heard,
            attempt,
            self.engine.describe(),
            self.ranks,
            SavePolicy(),
        )

    def train(self, last: int, save: bool = False) -> None:
        while self.progress.step < last:
            stats = one_step(self.engine, next(self.batches), self.recover.wait_for_copy)
            self.progress.step += 1
            self.progress.samples = self.batches.next_sample
            self.progress.metrics["loss"] = stats["loss"]
            self.now += 10.0 * (1 + self.ranks.rank)
            if save and self.progress.step in SAVES:
                self.recover.save(self.progress.step, self.progress.metrics)
        self.recover.finish()

    def standing(self) -> dict[str, Any]:
        return {
            "tensors": snapshot(self.engine),
            "cursor": self.batches.state_dict(),
            "next batch": next(self.batches)["input_ids"].tolist(),
            "progress": dataclasses.asdict(self.progress),
            "schedule": self.engine.state.state_dict()["schedule"],
        }
