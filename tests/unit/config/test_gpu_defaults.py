"""Defaults that depend on whether there are GPUs: filled in, so that everybody sees the same values."""

from pathlib import Path

import pytest

from areal_ray.config import ClusterConfig, Config, EngineConfig, load

pytestmark = pytest.mark.unit

TINY = str(Path(__file__).parents[3] / "conf" / "experiments" / "tiny.yaml")


@pytest.mark.parametrize(("gpus", "precision", "floor_s"), [("true", "bfloat16", 60.0), ("false", "float32", 10.0)])
def test_precision_and_the_watchdog_s_floor_follow_from_the_device(gpus, precision, floor_s):
    config = load(TINY, [f"cluster.use_gpu={gpus}"])
    assert (config.engine.precision, config.cluster.watchdog.floor_s) == (precision, floor_s)


@pytest.mark.parametrize("gpus", ["true", "false"])
def test_what_is_given_counts(gpus):
    given = ["engine.precision=float32", "cluster.watchdog.floor_s=7"]
    config = load(TINY, [f"cluster.use_gpu={gpus}", *given])
    assert (config.engine.precision, config.cluster.watchdog.floor_s) == ("float32", 7.0)
    assert load(TINY, [f"cluster.use_gpu={gpus}", "cluster.watchdog=null"]).cluster.watchdog is None


def test_a_configuration_made_in_python_has_them_too():
    assert Config().engine.precision == "float32"
    assert Config(cluster=ClusterConfig(use_gpu=True)).engine.precision == "bfloat16"
    assert Config(engine=EngineConfig(precision="bfloat16")).engine.precision == "bfloat16"
