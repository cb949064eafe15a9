"""The learning rate, step by step."""

from __future__ import annotations

import math
from typing import Any

from areal_ray.config import OptimConfig


class LrSchedule:
    """Linear warm-up, then constant, or down to `min_lr_ratio`; a pure function of the optimizer step.

    Down as a cosine or in a line, or (wsd: warmup, stable, decay; https://arxiv.org/abs/2404.06395) in a line over the
    last steps alone, so that a run of another length has the same rates before them. It multiplies each parameter
    group's own rate.

    Args:
        config: rates and shape, in steps.
        steps: the length of the run, where the rate is the smallest; a run that stops earlier (train.stop_at)
            does not change it.
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
        begin = c.warmup_steps
        if c.schedule == "wsd":
            decay = -(-self._steps // 10) if c.decay_steps is None else c.decay_steps
            begin = max(begin, self._steps - decay)
        share = min(1.0, max(0.0, (self.step - begin) / max(1, self._steps - begin)))
        left = 0.5 * (1 + math.cos(math.pi * share)) if c.schedule == "cosine" else 1 - share
        return base * (c.min_lr_ratio + (1 - c.min_lr_ratio) * left)

    def state_dict(self) -> dict[str, Any]:
        # The rate is for the receipt of a restore; it follows from the step.
        return {"step": self.step, "lr": self.lr(self._config.lr)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
