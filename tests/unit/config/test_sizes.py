"""A range of workers: which numbers of them can be used."""

import pytest

from areal_ray.config import ConfigError, load
from tests.unit.config.test_config import TINY

pytestmark = pytest.mark.unit


def sizes(*overrides):
    return load(TINY, ["train.global_batch_size=8", *overrides]).usable_sizes


@pytest.mark.parametrize(
    ("overrides", "usable"),
    [
        (["cluster.num_workers=2"], [2]),
        (["cluster.num_workers=[1,8]"], [1, 2, 4, 8]),
        (["cluster.num_workers=[3,7]"], [4]),
        (["cluster.num_workers=[1,8]", "engine.mesh.replicate=2"], [2, 4, 8]),
        (["cluster.num_workers=[1,8]", "engine.mesh.replicate=2", "engine.mesh.shard=2"], [4]),
        (["cluster.num_workers=[1,8]", "engine.mesh.tensor=2"], [2, 4, 8]),
        (["cluster.num_workers=[1,16]", "engine.mesh.tensor=2", "engine.mesh.replicate=2"], [4, 8, 16]),
    ],
)
def test_only_numbers_that_mesh_and_global_batch_can_be_shared_by(overrides, usable):
    assert sizes(*overrides) == usable


def test_the_range_of_one_number_is_that_number():
    assert load(TINY, ["cluster.num_workers=2"]).worker_range == (2, 2)
    assert load(TINY, ["cluster.num_workers=[1,4]"]).worker_range == (1, 4)


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ("[3,3]", "no number in"),
        ("[5,7]", "no number in"),
        ("[2,1]", "least before most"),
        ("[0,2]", "greater than 0"),
        ("0", "greater than 0"),
        ("[1,2,4]", "must be a number"),
        ("two", "must be a number"),
        ("2.5", "must be a number"),
        ("true", "must be a number"),
    ],
)
def test_a_range_without_a_usable_number_is_a_config_error(workers, said):
    with pytest.raises(ConfigError, match=said) as caught:
        sizes(f"cluster.num_workers={workers}")
    assert caught.value.key == "cluster.num_workers"
    assert caught.value.source == "command line"


def test_a_fault_may_hit_any_rank_of_the_largest_number():
    assert load(TINY, ["cluster.num_workers=[1,4]", "faults=[{kind: sigkill, rank: 3, step: 2}]"]).faults
    with pytest.raises(ConfigError, match=r"must be in \[0, 4\)"):
        load(TINY, ["cluster.num_workers=[1,4]", "faults=[{kind: sigkill, rank: 4, step: 2}]"])


def test_only_what_is_known_can_be_allowed_to_change():
    assert load(TINY, ["run.allow_changes=[data, run.seed]"]).run.allow_changes == ["data", "run.seed"]
    with pytest.raises(ConfigError, match="not everything"):
        load(TINY, ["run.allow_changes=[everything]"])
