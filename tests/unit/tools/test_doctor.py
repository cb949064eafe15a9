"""The doctor's findings, each thing set wrong."""

import re
import time

import pytest

from areal_ray.cli.main import main as run_cli
from areal_ray.config import load
from areal_ray.driver.memory import estimator
from areal_ray.run.versions import versions
from areal_ray.storage import LocalStorage
from areal_ray.tools.doctor import estimate, host_levers, local_findings
from areal_ray.tools.doctor.nodes import _memory, _of_node, _room, look

pytestmark = pytest.mark.unit
TINY = "conf/experiments/tiny.yaml"


def findings(tmp_path, *overrides):
    return {each.what: each for each in local_findings(load(TINY, overrides), LocalStorage(tmp_path))}


def test_an_estimate_is_what_torch_allocates_for_weights_gradients_and_optimizer():
    config = load(TINY, ["cluster.num_workers=1", "train.micro_batch_size=8"])
    one = estimate(config, 1)
    from areal_ray import models

    count = sum(p.numel() for p in models.build_model(config.model).parameters())
    assert one.parameters == count
    assert (one.device["weights"], one.device["optimizer"]) == (4 * count, 8 * count)
    assert one.device["logits"] == 2 * 4 * 8 * 256 * 264
    assert one.host == {"checkpoint image": 12 * count, "copies in memory": 24 * count, "copies of a partner": 0}
    two = estimate(load(TINY, ["engine.activation_checkpointing=true", "engine.accumulate=unsharded"]), 2)
    assert two.device["weights"] == 2 * count
    assert two.device["gradients"] == 2 * count  # one micro-batch on each: nothing adds up
    assert two.device["activations"] < one.device["activations"]
    whole = estimate(load(TINY, ["train.micro_batch_size=2", "engine.accumulate=unsharded"]), 2)
    assert whole.device["gradients"] == 4 * count


def test_an_estimate_follows_which_activations_are_kept():
    def activations(way):
        config = load(TINY, [f"engine.activation_checkpointing={way}", "train.micro_batch_size=8"])
        return estimate(config, 1).device["activations"]

    assert activations("full") == activations("true") == activations(1) < activations(2)
    assert activations("full") < activations("selective") < activations("none")
    assert activations(2) < activations(4) < activations("none") == activations("false") == activations(0)


@pytest.mark.parametrize("accumulate", ["sharded", "unsharded"])
def test_what_is_offloaded_is_counted_in_the_host(accumulate):
    parts = [f"engine.accumulate={accumulate}", "train.micro_batch_size=1", "cluster.use_gpu=true", "optim.ema={}"]
    here, there = (estimate(load(TINY, [*parts, f"engine.offload={how}"]), 2) for how in ("none", "all"))
    moved = here.device.keys() - there.device.keys()
    assert moved == {"weights", "optimizer", "averages"} | ({"gradients"} if accumulate == "sharded" else set())
    assert {part: there.host[part] for part in moved} == {part: here.device[part] for part in moved}
    assert there.host["gradients"] == here.device["weights"]
    assert {part: there.device[part] for part in there.device} == {part: here.device[part] for part in there.device}
    alone = estimate(load(TINY, [*parts, "engine.offload=all"]), 1)
    assert alone.device["gathered layers"] == there.device["gathered layers"] > 0
    assert "engine.offload=none" in host_levers(load(TINY, [*parts, "engine.offload=all"]), 2, estimate)
    assert "engine.offload" not in host_levers(load(TINY, parts), 2, estimate)


def test_an_estimate_of_an_adapter_is_about_what_is_trained():
    pytest.importorskip("peft", reason="adapters by LoRA need the extra areal_ray[lora]")
    whole = estimate(load(TINY, ["cluster.num_workers=1"]), 1)
    some = estimate(load(TINY, ["cluster.num_workers=1", "adapter={name: lora, args: {r: 2}}"]), 1)
    own = some.parameters - whole.parameters
    assert 0 < own < whole.parameters // 100
    assert some.device["weights"] == 4 * some.parameters
    assert (some.device["gradients"], some.device["optimizer"]) == (4 * own, 8 * own)
    assert some.host["checkpoint image"] == 12 * own


def test_what_is_frozen_has_no_gradients_and_a_loss_in_parts_no_logits():
    config = load(TINY, ["optim.groups=[{pattern: layers, freeze: true}]"])
    whole, some = estimate(config, 1), estimator(config)(config, 1)
    assert some.trained < whole.trained == whole.parameters == some.parameters
    assert some.device["weights"] == whole.device["weights"]
    assert some.device["gradients"] == 4 * some.trained
    assert some.host["checkpoint image"] == 4 * some.parameters + 8 * some.trained
    wide = load(TINY, ["model.config.vocab_size=300000"])
    assert estimator(wide)(wide, 1).device["logits"] < estimate(wide, 1).device["logits"] / 2


@pytest.mark.parametrize(
    "optim",
    [{"name": "adamw"}, {"name": "muon"}, {"name": "adafactor"}, {"name": "sgd"}, {"name": "sgd", "momentum": 0}],
    ids=str,
)
def test_an_estimate_is_what_each_optimizer_allocates(optim):
    from areal_ray import models
    from areal_ray.engine.optim import build_optimizer

    given = {"args": {"momentum": 0}} if "momentum" in optim else {}
    config = load(TINY, [f"optim.name={optim['name']}", f"optim.args={given.get('args', {})}", "optim.ema={}"])
    made = build_optimizer(models.build_model(config.model), config.optim)
    tensors = [t for state in made.state.values() for key, t in state.items() if key != "step"]
    alone = estimate(config, 1)
    assert alone.device["optimizer"] == sum(t.numel() * t.element_size() for t in tensors)
    assert alone.device["averages"] == alone.device["weights"]
    assert alone.host["checkpoint image"] == 2 * alone.device["weights"] + alone.device["optimizer"]


def test_all_is_well_where_it_is(tmp_path):
    assert {each.state for each in findings(tmp_path).values()} == {"ok"}
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_workers_that_do_not_fit_are_named(tmp_path):
    found = findings(tmp_path, "cluster.num_workers=[2,6]")["number of workers"]
    assert found.state == "note"
    assert "shared by 2, 4 workers; not by 3, 5, 6" in found.text
    assert "with 4 the last micro-batch is smaller than 4" in found.text


def test_a_model_that_is_too_large_comes_with_the_levers(tmp_path):
    large = ["model.config.hidden_size=16384", "model.config.num_hidden_layers=200", "model.config.head_dim=4096"]
    found = findings(tmp_path, *large)["memory of this machine"]
    assert found.state == "bad"
    parts = "checkpoint.memory_every_steps=null", "train.micro_batch_size=2", "engine.activation_checkpointing=true"
    sizes = [float(re.search(rf"{part} \(about ([\d.,]+) TB\)", found.text)[1]) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert f"In this order: {parts[0]} (about " in found.text
    assert re.search(r"more workers \(about .* TB with 4\)$", found.text)
    for way, pulled in (("full", True), ("selective", False), (4, False)):
        some = findings(tmp_path, *large, f"engine.activation_checkpointing={way}")["memory of this machine"]
        assert ("engine.activation_checkpointing=true" not in some.text) == pulled


def test_a_storage_that_cannot_be_written_or_gives_back_something_else(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    found = {each.what: each for each in local_findings(load(TINY), LocalStorage(tmp_path / "file"))}
    assert found["storage"].state == "bad"
    monkeypatch.setattr(LocalStorage, "read", lambda *_: b"stale")
    assert "something else" in findings(tmp_path)["storage"].text


def of_node(tmp_path, **changed):
    shared = LocalStorage(tmp_path)
    shared.replace("mark", b"it")
    now = time.time()
    found = look(changed.pop("storage", shared), "mark", "it") | changed
    return [
        (each.state, each.text) for each in _of_node("node-b", found, versions(), shared.location, now, time.time())
    ]


def test_a_node_like_this_one(tmp_path):
    assert of_node(tmp_path) == [("ok", "same versions, sees the storage")]


def test_a_path_that_only_the_driver_sees(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    ((state, text),) = of_node(tmp_path, storage=LocalStorage(tmp_path / "elsewhere"))
    assert (state, "it is not shared" in text) == ("bad", True)


def test_another_version_and_another_clock(tmp_path):
    there = versions() | {"torch": "1.0"}
    (first, second) = of_node(tmp_path, versions=there, time=time.time() - 3600)
    assert first[0] == "bad"
    assert "torch 1.0 (here " in first[1]
    assert second[0] == "note"
    assert "its clock is 36" in second[1]


def test_a_node_with_few_open_files_and_little_shared_memory(tmp_path):
    limits = [("open files", "256 at a time: raise it"), ("/dev/shm", "64 MB free: give it more")]
    found = of_node(tmp_path, limits=limits)
    assert found[:2] == [("bad", "open files: 256 at a time: raise it"), ("note", "/dev/shm: 64 MB free: give it more")]


@pytest.mark.parametrize(
    ("memory", "gpus", "states"),
    [
        (10**12, [], ["ok"]),
        (10**12, [10**10, 10**7], ["bad", "ok"]),
        (2 * 10**8, [10**10], ["ok", "note"]),
        (1, [], ["bad"]),
    ],
)
def test_what_a_node_has_is_laid_beside_what_its_workers_take(memory, gpus, states):
    config = load(TINY, ["cluster.use_gpu=true", "cluster.num_workers=[2,4]"])
    node = {"Resources": {"CPU": 64.0, "GPU": 8.0}}
    found = list(_memory("node-b", _room(config, node), {"memory": memory, "gpus": gpus}, config, estimate(config, 2)))
    assert [each.state for each in found] == states
    assert found[-1].text.startswith("4 workers take about ")
    assert not list(_memory("node-b", _room(config, {"Resources": {"CPU": 64.0}}), {}, config, estimate(config, 2)))


def test_the_command_says_what_it_looked_at_and_refuses_what_train_does(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    where = f"run.storage_path={tmp_path}"
    assert run_cli(["doctor", "--config", TINY, where]) == 0
    said = capsys.readouterr().out
    assert said.endswith("nothing stands in the way\n")
    assert "MB are not prepared yet" in said
    assert list(tmp_path.iterdir()) == []
    assert run_cli(["train", "--dry-run", "--config", TINY, where, "model.config.vocab_size=10"]) == 2
    assert "rows of embeddings" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()
