"""Evaluation on held-out data: what is evaluated, and when."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from areal_ray.engine import Objective, TrainEngine
from areal_ray.engine.next_token import NextToken
from areal_ray.engine.objectives import Batch
from areal_ray.engine.scalars import Reading
from areal_ray.train.cadence import Cadence


class Batches(Protocol):
    """This rank's parts of global batches, one after the other."""

    def __next__(self) -> Batch: ...

    def close(self) -> None: ...


class Evaluation(Protocol):
    """Something that looks at the model between two steps, and does not change it. A collective."""

    def run(self, step: int) -> Mapping[str, float]:
        """What it finds after so many steps, by the names of its metrics; the same on all ranks."""
        ...


@dataclass(frozen=True)
class Planned:
    """An evaluation and when it is due, beside the beginning and the end of the run."""

    cadence: Cadence
    evaluation: Evaluation


class Evaluations:
    """The evaluations of a run, each at its cadence; all of them at the beginning and at the end.

    Args:
        planned: in the order in which they are done.
        total_steps: the last of them is the end.
    """

    def __init__(self, planned: Sequence[Planned], total_steps: int) -> None:
        self._planned, self._total_steps = planned, total_steps

    def due(self, step: int, epoch: int) -> bool:
        """Whether there is something to evaluate after this step. Every rank must ask equally often."""
        return bool(self._due(step, epoch))

    def run(self, step: int, epoch: int) -> dict[str, float]:
        """Do what is due after this step. A collective.

        Returns:
            The metrics of all that was done.
        """
        found: dict[str, float] = {}
        for each in self._due(step, epoch):
            each.cadence.fired(step, epoch)
            found |= each.evaluation.run(step)
        return found

    def _due(self, step: int, epoch: int) -> list[Planned]:
        whole = step in (0, self._total_steps)
        return [each for each in self._planned if whole or each.cadence.due(step, epoch)]


class Evaluator:
    """Evaluates on the same held-out batches every time, whatever the world size.

    Args:
        engine: what to evaluate.
        open_batches: a fresh iterator at the beginning of the held-out data.
        count: global batches per evaluation.
        objective: as for training, perhaps with more means (`NextToken`).
        alive: called before every batch.
        prefix: of the names of its metrics.
    """

    def __init__(
        self,
        engine: TrainEngine,
        open_batches: Callable[[], Batches],
        count: int,
        objective: Objective,
        alive: Callable[[], None] = lambda: None,
        prefix: str = "held_out_",
    ) -> None:
        self._engine, self._open, self._count = engine, open_batches, count
        self._objective, self._alive, self._prefix = objective, alive, prefix

    def run(self, step: int = 0) -> dict[str, float]:
        """held_out_loss, in nats per token for text, and the objective's other means, the prefix before their names.

        A collective.
        """
        sums, weight = dict[str, float](), 0.0
        readings = deque[Reading]()
        batches = self._open()
        for i in range(self._count + 1):
            self._alive()
            if i < self._count:
                result = self._engine.evaluate(next(batches), self._objective)
                readings.append(Reading([result.weight, result.loss, *result.metrics.values()]))
                names = "loss", *result.metrics
            if i > 0:  # a batch is read when the next one is under way
                own, *values = readings.popleft().values()
                for name, value in zip(names, values, strict=True):
                    sums[name] = sums.get(name, 0.0) + value * own if own else sums.get(name, 0.0)
                weight += own
        batches.close()
        if not weight:  # of a set in which nothing is predicted there is nothing to tell
            return {}
        means = {name: total / weight for name, total in sums.items()}
        if isinstance(self._objective, NextToken):
            means = self._objective.derive(means)
        return {f"{self._prefix}{name}": value for name, value in means.items()}
