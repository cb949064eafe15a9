"""The late rank, found in what the flight recorders of several ranks have kept."""

import pickle

import pytest
import torch.distributed as dist

from areal_ray.distributed import flight_recorder
from areal_ray.distributed.flight_recorder import entered, late_rank

pytestmark = pytest.mark.unit


def entry(group, number, operation="all_gather", **more):
    return {
        "process_group": group,
        "collective_seq_id": number,
        "profiling_name": f"nccl:{operation}",
        "state": "scheduled",
        "is_p2p": False,
        **more,
    }


def trace(*entries):
    return pickle.dumps({"version": "2.10", "entries": list(entries)})


def test_of_every_group_the_last_collective_counts():
    world, shard = ("0", "default_pg"), ("1", "mesh_shard")
    seen = entered(
        trace(
            entry(world, 1, "all_reduce"),
            entry(shard, 1),
            entry(shard, 2, "reduce_scatter"),
            entry(shard, 9, "send", is_p2p=True),
        )
    )
    assert seen == {"0:default_pg": (1, "all_reduce"), "1:mesh_shard": (2, "reduce_scatter")}
    assert entered(trace()) == {}


def test_the_rank_with_fewer_collectives_is_late():
    ahead, behind = {"0:world": [5, "all_reduce"], "1:shard": [1234, "all_reduce"]}, {"1:shard": [1233, "all_gather"]}
    late = late_rank({0: ahead, 3: {**ahead, **behind}, 1: ahead})
    assert late == (3, "has entered 1233 collectives, and the others wait in all_reduce 1234 of group shard")


def test_of_several_late_ranks_one_is_named_and_the_others_are_counted():
    ahead, behind = {"1:shard": [8, "all_gather"]}, {"1:shard": [7, "all_gather"]}
    assert late_rank({0: ahead, 1: behind, 2: behind, 3: ahead})[0] == 1
    assert "as 1 more" in late_rank({0: ahead, 1: behind, 2: behind, 3: ahead})[1]


@pytest.mark.parametrize(
    "ranks",
    [
        {},
        {0: {}, 1: {}},
        {0: {"1:shard": [7, "x"]}, 1: {"1:shard": [7, "x"]}},
        {0: {"1:replicate": [7, "x"]}, 1: {"2:replicate": [9, "x"]}},  # groups of different ranks
    ],
)
def test_where_all_have_entered_the_same_nobody_is_late(ranks):
    assert late_rank(ranks) is None


def test_a_build_without_nccl_has_no_recorder():
    assert (flight_recorder.dump() is not None) == dist.is_nccl_available()
