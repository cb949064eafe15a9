"""A run that decides by itself when to save, killed in between, has the samples and weights of one that is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.small import differing

pytestmark = pytest.mark.distributed
AUTO = ("checkpoint.every=auto", "checkpoint.every_steps=null")


class Clock:
    """Every look at it takes half of what passes before a first save."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 30.0
        return self.now


def trained(rank: int, root: str, auto: bool, attempt: int = 1, until: int | None = None) -> dict[str, Any]:
    from areal_ray.train.cadence import AutoCadence, SaveHistory
    from tests.distributed import bad_numbers_run

    told: list[dict[str, Any]] = []
    clock, ranks = Clock(), bad_numbers_run.Ranks
    # Agreed by the ranks of the run, which are there when it is asked.
    cadence = (
        AutoCadence(1, SaveHistory(), told.append, lambda opinion: ranks().agree(opinion), clock) if auto else None
    )
    if cadence is not None and rank == 0:
        cadence.begin()
    run = bad_numbers_run.Run(root, *(AUTO if auto else ()), attempt=attempt, auto=cadence)
    run.restore.at_start("2 workers") if attempt > 1 else None
    if until is not None:
        before_step = run.before_step

        def stop(step: int) -> None:
            if step == until:
                run.job.recover.wait()
                raise StopIteration
            before_step(step)

        run.before_step = stop  # type: ignore[method-assign]
    try:
        run.train()
    except StopIteration:
        assert until is not None
    weights, _, progress = run.standing()
    saved = [event["step"] for event in run.run.each_event() if event["event"] == "saved"]
    return {"weights": weights, "progress": progress["samples"], "began": run.began, "saved": saved, "told": told}


def test_the_same_samples_and_weights(tmp_path: Path) -> None:
    told, tuned = tmp_path / "told", tmp_path / "tuned"
    for path in (told, tuned):
        path.mkdir()
    right = run_ranks(trained, 2, str(told), False)
    first = run_ranks(trained, 2, str(tuned), True, 1, 5)
    then = run_ranks(trained, 2, str(tuned), True, 2)
    (last, *_) = first[0]["saved"][::-1]
    assert last < 5
    assert first[0]["told"]
    assert first[1]["told"] == []
    for rank in range(2):
        assert then[rank]["began"] == list(range(last + 1, 7))
        assert then[rank]["progress"] == right[rank]["progress"]
        assert differing(then[rank]["weights"], right[rank]["weights"]) == []
        assert all(isinstance(tensor, torch.Tensor) for tensor in right[rank]["weights"].values())
