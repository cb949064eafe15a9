"""The learning rate, step by step."""

from __future__ import annotations

import math
from typing import Any

from areal_ray.config import OptimConfig


class LrSchedule:
    """Linear warm-up, then constant or cosine down to `min_lr_ratio`; a pure function of the optimizer step.

    It multiplies each parameter group's own rate.

    Args:
        config: rates and shape.
        steps: where the cosine ends; a run that stops earlier (train.stop_at) does not change it.
    """

    def __init__(self, config: OptimConfig, steps: int) -> None:
        self._config, self._steps = config, steps
        self.step = 0  # optimizer steps taken

    def lr(self, base: float) -> float:
        """The rate of the next optimizer step for a group whose own rate is `base`."""
        c = self._config
        if self.step < c.warmup_steps:
            return base * (self.step + 1) / c.warmup_steps
        if c.schedule == "constant":
            return base
        share = min(1.0, (self.step - c.warmup_steps) / max(1, self._steps - c.warmup_steps))
        return base * (c.min_lr_ratio + (1 - c.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * share)))

    def state_dict(self) -> dict[str, Any]:
        # The rate is for the receipt of a restore; it follows from the step.
        return {"step": self.step, "lr": self.lr(self._config.lr)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
