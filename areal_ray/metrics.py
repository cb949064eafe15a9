"""What happened since the last logged step, summed up where it was computed."""

from __future__ import annotations

from typing import Any

import torch


class Window:
    """Means over the steps of one logging window.

    Values stay on their device until `flush`, so that adding one never waits for the GPU. Part of a checkpoint: a run
    resumed in the middle of a window logs the same mean as one that was not disturbed.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor | float] = {}
        self._count = 0

    def add(self, values: dict[str, torch.Tensor | float]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + (value.double() if torch.is_tensor(value) else value)
        self._count += 1

    def flush(self) -> dict[str, float]:
        """The mean of every value since the last flush."""
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: float(total) for name, total in self._sums.items()}, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._count = dict(state["sums"]), state["count"]
