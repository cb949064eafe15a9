"""How a run accumulates gradients: chosen once, from nothing that a restart may change; and sums that would be lost."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from areal_ray.config import load
from areal_ray.distributed.accumulation import LARGE_BYTES, choose, finish
from areal_ray.distributed.overlap import LateReduceScatter

pytestmark = pytest.mark.unit

LARGE = LARGE_BYTES // 4 + 1  # elements


def chosen(*overrides, elements=LARGE, recorded=None, trained=True):
    sizes = ["train.global_batch_size=8", "train.micro_batch_size=2"]
    parameters = [nn.Parameter(torch.empty(elements, device="meta"), requires_grad=trained)]
    return choose(load("conf/experiments/tiny.yaml", [*sizes, *overrides]), parameters, recorded)


@pytest.mark.parametrize(
    ("overrides", "how"),
    [
        (["cluster.num_workers=4"], "unsharded"),  # one micro-batch, always
        (["cluster.num_workers=2"], "sharded"),
        (["cluster.num_workers=[2,4]"], "sharded"),  # on four workers too
        (["cluster.num_workers=[3,4]"], "unsharded"),  # eight rows are not shared by three
        (["cluster.num_workers=8", "engine.mesh.tensor=2"], "unsharded"),  # half of the gradients, and one micro-batch
        (["cluster.num_workers=2", "engine.mesh.tensor=2"], "unsharded"),  # half of the gradients
        (["cluster.num_workers=4", "train.micro_batch_size=1"], "sharded"),
    ],
)
def test_auto_looks_at_the_smallest_usable_number_of_workers(overrides, how):
    assert chosen(*overrides) == how


def test_auto_leaves_small_models_alone():
    assert chosen(elements=LARGE - 1) == "unsharded"
    assert chosen(trained=False) == "unsharded"  # no gradients at all


@pytest.mark.parametrize("recorded", ["sharded", "unsharded"])
def test_auto_keeps_to_what_the_checkpoint_says(recorded):
    for workers in (1, 2, 8):
        assert chosen(f"cluster.num_workers={workers}", recorded=recorded) == recorded


def test_a_word_of_the_user_counts_more_than_the_checkpoint():
    assert chosen("engine.accumulate=sharded", recorded="unsharded", elements=1) == "sharded"
    assert chosen("engine.accumulate=unsharded", recorded="sharded") == "unsharded"


def test_a_parameter_that_the_last_micro_batch_did_not_use_is_named_where_replicas_would_lose_its_sum():
    def after(how, micro_batches, **sizes):
        model = nn.ModuleDict({"used": nn.Linear(2, 2), "frozen": nn.Linear(2, 2), "left_out": nn.Linear(2, 2)})
        model["frozen"].requires_grad_(False)
        for parameter in model["used"].parameters():
            parameter.grad = torch.ones_like(parameter)
        finish(model, LateReduceScatter(), how, micro_batches, SimpleNamespace(sizes=lambda: {"shard": 2, **sizes}))

    after("sharded", 2)
    after("sharded", 1, replicate=2)
    after("unsharded", 2, replicate=2)
    with pytest.raises(RuntimeError, match=r"left_out\.weight has no gradient .* engine\.accumulate=unsharded"):
        after("sharded", 2, replicate=2)
