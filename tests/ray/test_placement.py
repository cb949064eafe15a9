"""A placement group of one group of workers is used by the next one: on a real cluster."""

from types import SimpleNamespace

import pytest
import ray
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupContext
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from areal_ray.controller import placement
from areal_ray.controller.placement import PlacementGroupCache

pytestmark = pytest.mark.ray

LIMIT_S = 60
CONTEXT = SimpleNamespace(run_id="reserving")


def wanted(workers: int) -> WorkerGroupContext:
    return WorkerGroupContext(
        run_attempt_id="1", train_fn_ref=None, num_workers=workers, resources_per_worker={"CPU": 0.5}
    )


@pytest.fixture
def cache(ray_cluster):
    yield PlacementGroupCache()
    placement.release_all(CONTEXT)


def taken(cache: PlacementGroupCache, workers: int = 2):
    group = cache.acquire(CONTEXT, wanted(workers))
    assert group.wait(LIMIT_S)
    return group


def state(group) -> str:
    return placement_group_table(group)["state"]


@ray.remote(num_cpus=0.5)
class Resident:
    def here(self) -> bool:
        return True


def resident(group) -> ray.actor.ActorHandle:
    """A process in the second place of the group."""
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=1)
    made = Resident.options(scheduling_strategy=place).remote()
    assert ray.get(made.here.remote(), timeout=LIMIT_S)
    return made


def test_a_group_that_wants_the_same_gets_what_the_last_one_had(cache):
    first = taken(cache)
    ray.kill(resident(first))
    cache.retain(first, wanted(2))
    second = taken(cache)
    assert second.id == first.id
    assert state(second) == "CREATED"
    assert taken(cache).id != first.id  # it is kept once


def test_one_that_wants_another_number_gets_its_own_and_the_kept_one_is_given_back(cache):
    first = taken(cache)
    cache.retain(first, wanted(2))
    assert taken(cache, 1).id != first.id
    assert state(first) == "REMOVED"


def test_where_a_process_lives_on_nothing_is_kept(ray_cluster):
    cache = PlacementGroupCache(ending_s=0.1)
    first = taken(cache)
    staying = resident(first)
    cache.retain(first, wanted(2))
    assert taken(cache).id != first.id
    assert state(first) == "REMOVED"
    placement.release_all(CONTEXT)
    del staying


def test_what_somebody_else_has_given_back_is_reserved_anew(cache):
    first = taken(cache)
    cache.retain(first, wanted(2))
    placement.release_all(CONTEXT)
    assert taken(cache).id != first.id


def test_what_is_kept_can_be_given_back(cache):
    first = taken(cache)
    cache.retain(first, wanted(2))
    cache.release()
    assert state(first) == "REMOVED"
    cache.release()
