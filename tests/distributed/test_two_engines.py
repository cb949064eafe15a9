"""Two engines in one run, as an actor and a critic: one checkpoint for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint import AsyncWriter, Catalog, StoredState
from areal_ray.distributed import Ranks
from areal_ray.engine import FSDPEngine
from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints
from areal_ray.train.loop import Progress
from areal_ray.train.recovery import PendingSave, RecoverHandler, SavePolicy
from tests.distributed.ranks import run_ranks
from tests.distributed.small import differing, erase, snapshot, start_engine, train

pytestmark = pytest.mark.distributed


class Silent:
    def begins(self, checkpoint: str, step: int) -> None: ...

    def saved(self, dump: PendingSave, blocked_s: float, waited_s: float, total_s: float) -> None: ...

    def skipped(self, step: int) -> None: ...

    def passed_over(self, checkpoint: str, reason: str) -> None: ...


class Run:
    """An actor, a critic of another size and what they have in common."""

    def __init__(self, root: str, attempt: int) -> None:
        self.engines: dict[str, FSDPEngine] = {
            "actor": start_engine(),
            "critic": start_engine("run.seed=1", "model.config.num_hidden_layers=1"),
        }
        self.progress = Progress()
        state: dict[str, Stateful] = {name: engine.state for name, engine in self.engines.items()}
        writer = AsyncWriter(Ranks(), Ranks(dist.new_group(backend="gloo")))
        self.fence = writer.fence
        self.recover = RecoverHandler(
            Catalog(LocalStorage(root)),
            {**state, "progress": self.progress},
            writer,
            Silent(),
            attempt,
            {},
            Ranks(),
            SavePolicy(),
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.progress.step += 1
            train(self.engines["actor"], seed=self.progress.step, fence=self.fence)
            if self.progress.step % 2:  # the critic has a clock of its own
                train(self.engines["critic"], seed=100 + self.progress.step, fence=self.fence)

    def tensors(self) -> dict[str, dict[str, Any]]:
        return {name: snapshot(engine) for name, engine in self.engines.items()}

    def schedules(self) -> dict[str, Any]:
        return {name: engine.state.state_dict()["schedule"] for name, engine in self.engines.items()}


def live_and_resume(rank: int, root: str) -> dict[str, Any]:
    first = Run(root, attempt=1)
    first.train(3)
    first.recover.save(3, {})
    first.train(1)
    first.recover.finish()
    undisturbed, schedules = first.tensors(), first.schedules()
    again = Run(root, attempt=2)
    for engine in again.engines.values():
        erase(engine)
    name = again.recover.load()
    step = again.progress.step
    again.train(1)
    return {
        "restored": (name, step),
        "lost": {name: differing(tensors, undisturbed[name]) for name, tensors in again.tensors().items()},
        "schedules": again.schedules() == schedules,
    }


def test_one_checkpoint_brings_both_back_bit_for_bit(tmp_path: Path) -> None:
    for seen in run_ranks(live_and_resume, 2, str(tmp_path)):
        assert seen["restored"] == ("step-00000003.a1", 3)
        assert seen["lost"] == {"actor": [], "critic": []}
        assert seen["schedules"]
    saved = StoredState(LocalStorage(tmp_path / "step-00000003.a1"))
    assert {name.split(".")[0] for name in saved.names} == {"actor", "critic"}
    assert saved.values["actor"]["schedule"]["step"] == 3
    assert saved.values["critic"]["schedule"]["step"] == 2
    assert checkpoints.check(LocalStorage(tmp_path / "step-00000003.a1")) > 0
