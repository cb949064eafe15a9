"""Lines that say what a run is about to do."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch import nn

from areal_ray.config import ModelConfig, load
from areal_ray.driver.opening import counted_operations, opening
from areal_ray.models import build_model
from areal_ray.worker.main import _processes

pytestmark = pytest.mark.unit
TINY = "conf/experiments/tiny.yaml"


def model():
    made = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 1, bias=False))
    made[0].requires_grad_(False)
    return made


def test_the_lines_have_the_numbers_that_one_asks_for_first():
    config = load(TINY, ["cluster.num_workers=[2,8]", "train.global_batch_size=16", "train.micro_batch_size=4"])
    source = SimpleNamespace(split=lambda name: range(25_600))
    data, about, step = opening(config, model(), (range(100), range(7)), {"notes": source})
    assert data == "data: notes: 25,600 tokens: 100 sequences of 256, 6 steps an epoch; 7 sequences held out"
    assert about == "model: Sequential, 110 parameters, of which 10 are trained (9.09%)"
    assert step == (
        "step: 16 sequences (4,096 tokens): 2 micro-batches of 4 on each of 2 workers, "
        "or 1 micro-batch of 2 on each of 8 workers"
    )
    whole = build_model(config.model)
    data, about, _ = opening(config, whole, (range(8), range(0)), {})
    assert data == "data: 8 sequences of 256, 1 step an epoch; 0 sequences held out"
    assert about.endswith(f"{sum(p.numel() for p in whole.parameters()):,} parameters")


def test_operations_are_counted_where_somebody_can_use_them():
    assert counted_operations(load(TINY)) == (None, "")
    operations, why = counted_operations(load(TINY, ["logging.peak_tflops=1"]))
    assert (why, operations > 1e7) == ("", True)
    config = load(TINY, ["logging.peak_tflops=1"])
    own = replace(config, model=ModelConfig(factory="tests.unit.driver.test_opening:model"))
    operations, why = counted_operations(own)
    assert operations is None
    assert why.endswith("a method operations_per_token(seq_len) of the model would tell")


def test_processes_are_named_and_those_of_many_ranks_are_not_all():
    assert _processes([("a", 7), ("a", 9), ("b", 7)], True) == (
        "  processes: 7, 9 on a; 7 on b (kill -9 7 there, and see the run come back)"
    )
    assert _processes([("a", 7)], False) == "  processes: 7 on a"
    assert _processes([("a", pid) for pid in range(1024)], True).endswith("15 on a; 1,008 more in the ledger")
