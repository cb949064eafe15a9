"""The receipt of a restore: what is shown, and what is a contradiction."""

import copy

import pytest

from areal_ray.train.receipt import receipt

pytestmark = pytest.mark.unit

VALUES = {
    "progress": {"step": 40, "samples": 320, "metrics": {}},
    "data": {"next_sample": 320, "epoch": 1, "seed": 0, "fingerprint": "f"},
    "engine": {"schedule": {"step": 40, "lr": 0.001}},
}
INFO = {
    "world_size": 2,
    "mesh": {"shard": 2},
    "config": {
        "train": {"global_batch_size": 8, "stop_at": 40},
        "optim": {"lr": 0.001},
        "run": {"name": "a", "s3": {"secret_key": "***"}},
        "faults": [],
    },
}


def changed(tree, **values):
    """A copy with other values at dotted paths, given with `__` for the dot."""
    tree = copy.deepcopy(tree)
    for path, value in values.items():
        *parents, last = path.split("__")
        node = tree
        for name in parents:
            node = node[name]
        node[last] = value
    return tree


def test_a_restore_as_it_was_shows_every_value_once_and_no_change():
    same = receipt(VALUES, INFO, VALUES, INFO)
    assert same.text() == (
        "  step 40, samples 320, epoch 1, lr 0.001, optimizer step 40, global batch 8, world size 2, mesh shard 2"
    )
    assert same.event() == {"before": same.now, "now": same.before, "changed": {}, "promise": "the same bits"}


def test_what_differs_is_shown_before_and_now():
    info = changed(INFO, world_size=4, mesh={"replicate": 2, "shard": 2}, config__optim__lr=0.01)
    other = receipt(VALUES, INFO, changed(VALUES, engine__schedule__lr=0.01), info)
    assert "lr 0.001 -> 0.01" in other.text()
    assert "world size 2 -> 4, mesh shard 2 -> replicate 2 x shard 2" in other.text()
    assert other.changed == {"optim.lr": [0.001, 0.01]}
    assert "  changed: optim.lr 0.001 -> 0.01" in other.text().splitlines()


@pytest.mark.parametrize(
    ("config", "layout", "promise"),
    [
        ({}, {}, "the same bits"),
        ({"cluster": {"use_gpu": True}, "engine": {"deterministic": True}}, {}, "the same bits"),
        ({"cluster": {"use_gpu": True}, "engine": {"deterministic": False}}, {}, "weights to rounding"),
        ({}, {"world_size": 4}, "weights to rounding"),
        ({}, {"mesh": {"replicate": 2}}, "weights to rounding"),
        ({}, {"device": "NVIDIA H200"}, "weights to rounding"),
        ({}, {"versions": {"torch": "2.12.0"}}, "weights to rounding"),
    ],
)
def test_it_says_what_is_promised_from_here_on(config, layout, promise):
    made = {"device": "NVIDIA H100", "versions": {"torch": "2.13.0", "ray": "2.60.0"}}
    saved = {**INFO, **made, "config": {**INFO["config"], **config}}
    given = receipt(VALUES, saved, VALUES, {**saved, **layout})
    assert promise in given.event()["promise"]
    assert ("  from here on: " in given.text()) is (promise != "the same bits")


def test_name_place_end_and_faults_are_no_changes():
    info = changed(INFO, config__run__name="b", config__run__s3={}, config__train__stop_at=None, config__faults=[1])
    assert receipt(VALUES, INFO, VALUES, info).changed == {}


@pytest.mark.parametrize(
    ("where", "wrong", "said"),
    [
        ("saved", {"engine__schedule__step": 39}, "the checkpoint is at step 40, but its optimizer at step 39"),
        ("live", {"engine__schedule__step": 0}, "the restored run is at step 40, but its optimizer at step 0"),
        ("saved", {"data__next_sample": 312}, "the checkpoint has trained on 320 samples, but its cursor is at 312"),
        ("live", {"data__next_sample": 0}, "the restored run has trained on 320 samples, but its cursor is at 0"),
        (
            "live",
            {"progress__samples": 8, "data__next_sample": 8},
            "the checkpoint is at samples 320, the restored run at 8",
        ),
    ],
)
def test_a_contradiction_stops_the_run(where, wrong, said):
    values = {"saved": VALUES, "live": VALUES, where: changed(VALUES, **wrong)}
    with pytest.raises(ValueError, match=said):
        receipt(values["saved"], INFO, values["live"], INFO)


def test_a_checkpoint_that_says_nothing_of_its_config_has_no_changes():
    old = {"world_size": 2, "mesh": {"shard": 2}}
    assert receipt(VALUES, old, VALUES, INFO).changed == {}


@pytest.mark.parametrize("key", ["auto", "sharded"])
def test_another_way_to_accumulate_gradients_is_a_change(key):
    """By what it was, not by the word in the configuration; a checkpoint that does not say is unsharded."""
    live = {**changed(INFO, config__engine={"accumulate": key}), "accumulate": "sharded"}
    same = receipt(VALUES, {**INFO, "accumulate": "sharded"}, VALUES, live)
    assert (same.changed, same.promise) == ({}, "the same bits")
    other = receipt(VALUES, INFO, VALUES, live)
    assert other.changed == {"engine.accumulate": ["unsharded", "sharded"]}
    assert "weights to rounding" in other.promise
    assert receipt(VALUES, INFO, VALUES, {**INFO, "accumulate": "unsharded"}).changed == {}


@pytest.mark.parametrize("key", ["auto", "chunked"])
def test_another_way_to_the_loss_is_a_change(key):
    live = {**changed(INFO, config__model={"loss": key}), "loss": "chunked"}
    same = receipt(VALUES, {**INFO, "loss": "chunked"}, VALUES, live)
    assert (same.changed, same.promise) == ({}, "the same bits")
    other = receipt(VALUES, INFO, VALUES, live)
    assert other.changed == {"model.loss": ["logits", "chunked"]}
    assert "weights to rounding" in other.promise
