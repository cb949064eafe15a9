"""One step of the engine, as the loop takes it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from areal_ray.engine import FSDPEngine
from areal_ray.engine.objectives import LanguageModeling


def step_of(engine: FSDPEngine, batch: dict[str, torch.Tensor], wait_for_copy: Callable[[], None]) -> None:
    """Train on a batch; copies of the state that are under way are waited for before it changes."""
    result = engine.forward_backward(batch, LanguageModeling())
    result.numbers()
    wait_for_copy()
    engine.optimizer_step()
    engine.lr_scheduler_step()
