"""How often a step makes the host wait for the device: once, and with a lag only for the step before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.host_waits_run import FIRST, LAST, on_cpu, on_gpu, prefetched
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

SPIKES = ["train.bad_step.spike_factor=3.0", "train.bad_step.spike_window=2"]
STEPS = range(FIRST, LAST)
AT_ONCE = [each for step in STEPS for each in (f"step {step}", "read", "update")]
A_STEP_LATER = [each for step in STEPS for each in (f"step {step}", "update", "read")]


def check_order(seen: dict[str, Any], lag: int) -> None:
    # With a lag the numbers that are read after an update are those of the step before: test_lag.py.
    assert seen["order"] == (A_STEP_LATER if lag else AT_ONCE)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("mesh", [[], ["engine.mesh.tensor=2"], ["engine.activation_checkpointing=true"]], ids=str)
def test_the_host_reads_the_device_once_a_step(tmp_path: Path, lag: int, mesh: list[str]) -> None:
    for seen in run_ranks(on_cpu, 2, str(tmp_path), f"train.bad_step.lag={lag}", *SPIKES, *mesh):
        check_order(seen, lag)
        assert seen["reads"] == ["engine/scalars.py"] * (LAST - FIRST)  # and nothing for a micro-batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lag", [0, 1])
def test_on_a_gpu_nothing_else_waits(tmp_path: Path, lag: int) -> None:
    (seen,) = run_ranks(on_gpu, 1, str(tmp_path), f"train.bad_step.lag={lag}", *SPIKES, gpu=True)
    check_order(seen, lag)
    assert seen["waits"] == []  # a reading waits for its own event, of which torch does not warn
    assert (seen["finite"], seen["maker"]) == (True, "Prefetch")
    assert len(seen["guard"]["losses"]) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_that_are_copied_ahead_are_whole_when_they_are_used() -> None:
    ((ahead, plain),) = run_ranks(prefetched, 1, gpu=True)
    assert ahead == plain
