"""Values of the configuration that may be written in several ways, as the types that they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from areal_ray.config.errors import ConfigError


class WorkerRange(NamedTuple):
    """The numbers of workers that a run may have: `cluster.num_workers`, a number or [least, most]."""

    least: int
    most: int

    @staticmethod
    def parse(value: Any) -> WorkerRange:
        """The range that a value means.

        Raises:
            ConfigError: if it is neither a number nor a range of positive ones.
        """
        numbers = list(value) if isinstance(value, list | tuple) else [value, value]
        if not (len(numbers) == 2 and all(type(number) is int for number in numbers)):
            raise ConfigError("cluster.num_workers", f"must be a number, or [least, most], not {value}")
        if not 0 < numbers[0] <= numbers[1]:
            raise ConfigError("cluster.num_workers", f"must be greater than 0, least before most, not {value}")
        return WorkerRange(*numbers)


@dataclass(frozen=True)
class StandbyCount:
    """The number of standbys on a node: `cluster.standbys`, auto, off or a number.

    Args:
        count: on every node; None: as many as the node has workers.
    """

    count: int | None

    @staticmethod
    def parse(value: Any) -> StandbyCount:
        """The count that a value means; YAML reads the word off as False.

        Raises:
            ConfigError: if it is none of these.
        """
        if value == "auto":
            return StandbyCount(None)
        if value in ("off", False):
            return StandbyCount(0)
        if type(value) is int and value >= 0:
            return StandbyCount(value)
        raise ConfigError("cluster.standbys", f"must be auto, off or a number of processes per node, not {value!r}")

    def on(self, local_workers: int) -> int:
        return local_workers if self.count is None else self.count


@dataclass(frozen=True)
class Recomputed:
    """The units whose activations are computed again in the backward pass: `engine.activation_checkpointing`.

    Args:
        every: each so many-th unit, the first one among them; 0: none.
        keeps_products: whether the results of matrix products and attention are kept, and only the rest is not.
    """

    every: int
    keeps_products: bool = False

    @staticmethod
    def parse(value: Any) -> Recomputed:
        """The units that a value means.

        Raises:
            ConfigError: if it is none of these.
        """
        if value in ("none", None, False):  # and 0, which is equal to it: the key was a bool once
            return Recomputed(0)
        if value in ("full", True):
            return Recomputed(1)
        if value == "selective":
            return Recomputed(1, keeps_products=True)
        if type(value) is int and value >= 1:
            return Recomputed(value)
        text = f"must be none, full, selective, or a number n for every n-th unit, not {value!r}"
        raise ConfigError("engine.activation_checkpointing", text)
