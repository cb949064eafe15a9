"""Modules that are sharded one by one: named by the user, and watched for a rank that is slow in them."""

import pytest

from .models import train

pytestmark = pytest.mark.ray


def test_units_named_by_their_class_are_the_model_s_own(undisturbed, run):
    assert run.train("model.shard_units=[Qwen3DecoderLayer]") == 0
    assert run.digest() == undisturbed.digest()


def test_a_rank_that_is_slow_in_its_layers_is_named(ray_cluster, run, capfd):
    status = train(run, "slow_on_rank_1", "model.shard_units=[Qwen3DecoderLayer]", "train.steps=33", seconds=0.05)
    assert status == 0
    (event,) = run.events("straggler")
    assert event["rank"] == 1
    assert event["own_s"] > 0.1 > event["others_s"]
    assert "worker 1 on" in capfd.readouterr().out
