"""Means of an objective's metrics over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from areal_ray.engine.scalars import positive_or_one, scalar_on


class MetricSums:
    """Sums values with their weights; one collective for all of them, the same on all ranks whatever they have seen.

    Args:
        names: of the metrics that there may be, see `Objective.metrics`.
        device: of the values.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._places = {name: i for i, name in enumerate(names)}
        self._sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)  # weighted values, weights

    def add(self, values: Mapping[str, torch.Tensor | float], weight: torch.Tensor) -> None:
        """Take the means over a micro-batch; one that is missing has no weight there.

        Raises:
            ValueError: for one that was not announced.
        """
        for name, value in values.items():
            if name not in self._places:
                raise ValueError(f"the objective's loss() gives `{name}`, which is not among its `metrics`")
            given = scalar_on(self._sums.device, value).double()
            self._sums[:, self._places[name]] += torch.stack([given * weight, weight.double()])

    def means(self, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
        """The means by name, scalars; 0 where no micro-batch had any. A collective."""
        if not self._places:
            return {}
        dist.all_reduce(self._sums, group=group)
        means = self._sums[0] / positive_or_one(self._sums[1])
        return dict(zip(self._places, means.unbind(), strict=True))
