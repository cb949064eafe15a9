"""Exports beside training: which checkpoints, one at a time, none twice, and nothing of it in training's way."""

import json
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

from areal_ray import models
from areal_ray.checkpoint import Catalog
from areal_ray.checkpoint.read_lock import has_readers
from areal_ray.config import AdapterConfig, ConfigError, ModelConfig, load
from areal_ray.data.tokenizers import ByteTokenizer
from areal_ray.driver import exports, preflight
from areal_ray.driver.exports import Exporter
from areal_ray.run import RunDir
from areal_ray.run.fence import RunTaken
from areal_ray.storage import LocalStorage
from areal_ray.tools.export import Form, __main__
from areal_ray.tools.export.folder import clear, discard, export_into, finished, keep_newest
from areal_ray.train.cadence import AlsoEvery, Cadence
from tests.unit.checkpoint.boxes import save_box
from tests.unit.config.test_config import TINY
from tests.unit.tools.test_export import LLAMA, saved

pytestmark = pytest.mark.unit


class Made(Exporter):
    """Makes nothing but the file that says so; `fails` are steps at which that goes wrong."""

    def __init__(self, *args, fails=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.made, self.fails, self.locked = [], fails, []

    def _in_process(self, job):
        self.locked.append(has_readers(self._catalog.directory(job["checkpoint"])))
        if job["step"] in self.fails:
            return {"error": "OSError: no room"}
        self.made.append(job["checkpoint"])
        folder = self._folder.sub(f"step-{job['step']:08d}")
        folder.ensure()
        folder.replace("config.json", b"{}")
        return {"bytes": 1, "tensors": 1}


@pytest.fixture
def exporter(tmp_path):
    def exporter(*overrides, kind=Made, job=None, **options):
        config = load(TINY, [f"run.storage_path={tmp_path}", "export={}", *overrides])
        said = []
        made = kind(config, RunDir(LocalStorage(tmp_path / "tiny"), job), (), said.append, look_s=0.01, **options)
        made.said = said
        return made

    (tmp_path / "tiny").mkdir()
    return exporter


def names(made):
    return list(finished(made._folder).values())


def until(condition):
    """Wait for what another thread does."""
    waiting = threading.Event()
    for _ in range(1000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it does not come")


class Slow(Made):
    """Needs as long for each as the test wants."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.go_on = threading.Event()

    def _in_process(self, job):
        self.go_on.wait(60)
        return None if self._stop.is_set() else super()._in_process(job)

    def stop(self):
        super().stop()
        self.go_on.set()


def test_those_at_the_cadence_are_exported_once_and_the_end(exporter, tmp_path):
    for step, attempt in ((5, 1), (10, 1), (10, 2), (15, 2), (20, 2), (22, 2)):
        save_box(tmp_path / "tiny", step, attempt)
    made = exporter("export.every_steps=10")
    assert not made.is_done("step-00000022.a2")
    made.finish("step-00000022.a2")
    assert made.made == ["step-00000010.a2", "step-00000020.a2", "step-00000022.a2"]
    assert made.locked == [True, True, False]  # what waits for its turn is not deleted meanwhile
    assert not any(has_readers(Catalog(made._run.storage).directory(name)) for name in made.made)
    assert [event["step"] for event in made._run.events("exported")] == [10, 20, 22]
    again = exporter("export.every_steps=10", "export.keep=2")
    assert again.is_done("step-00000022.a2")
    again.finish("step-00000022.a2")
    assert again.made == []


def test_so_many_of_the_newest_stay(exporter, tmp_path):
    for step in (10, 20, 30, 40):
        save_box(tmp_path / "tiny", step)
    made = exporter("export.every_steps=10", "export.keep=2", "export.at_end=false")
    made.finish("step-00000040.a1")
    assert made.made == ["step-00000030.a1", "step-00000040.a1"]  # the others would not stay
    save_box(tmp_path / "tiny", 50)
    made.finish("step-00000050.a1")
    assert names(made) == ["step-00000040", "step-00000050"]


def test_they_are_made_while_it_trains_and_what_fails_is_said_once(exporter, tmp_path):
    made = exporter("export.every_steps=10", fails=(10, 20))
    with made.beside():
        for step in (10, 20, 30):
            save_box(tmp_path / "tiny", step)
        waiting = threading.Event()
        while len(made.locked) < 3:
            waiting.wait(0.01)
        made.finish("step-00000030.a1")
    assert names(made) == ["step-00000030"]
    assert [line for line in made.said if "failed" in line] == [
        "exporting step-00000010.a1 failed: OSError: no room; it is tried again when the run is started again; "
        "training goes on, and later failures stand in the ledger only"
    ]
    assert [event["checkpoint"] for event in made._run.events("export_failed")] == [
        "step-00000010.a1",
        "step-00000020.a1",
    ]
    again = exporter("export.every_steps=10")
    again.finish("step-00000030.a1")
    assert again.made == ["step-00000010.a1", "step-00000020.a1"]


def test_what_is_due_while_another_is_exported_is_kept_until_its_turn_has_come(exporter, tmp_path):
    made = exporter("export.every_steps=10", kind=Slow)

    def is_kept(step):
        return has_readers(made._catalog.directory(Catalog.name(step, 1)))

    with made.beside():
        save_box(tmp_path / "tiny", 10)
        until(lambda: made._current == "step-00000010.a1")
        save_box(tmp_path / "tiny", 20)
        until(lambda: is_kept(20))
        assert is_kept(10)
        made.go_on.set()
        until(lambda: len(made.made) == 2)
    assert not is_kept(10)
    assert not is_kept(20)


def test_what_would_not_stay_any_more_is_let_go(exporter, tmp_path):
    made = exporter("export.every_steps=10", "export.keep=1", kind=Slow)
    with made.beside():
        for step in (10, 20, 30):
            save_box(tmp_path / "tiny", step)
            until(lambda: has_readers(made._catalog.directory(Catalog.name(step, 1))))  # noqa: B023
        until(lambda: not has_readers(made._catalog.directory(Catalog.name(20, 1))))
        made.go_on.set()
        until(lambda: len(made.made) == 2)
    assert made.made == ["step-00000010.a1", "step-00000030.a1"]


def test_a_driver_that_has_lost_the_run_ends_its_export_and_writes_nothing(exporter, tmp_path, monkeypatch):
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    made = exporter("export.every_steps=10", kind=Slow, job="ours")
    made._run.fence.take()
    with made.beside():
        save_box(tmp_path / "tiny", 10)
        until(lambda: made._current)
        RunDir(made._run.storage, "theirs").fence.take()
        until(made._stop.is_set)
        until(lambda: made._current is None)
    assert (names(made), made.said, failed) == ([], [], [])
    late = exporter("export.every_steps=10", job="ours", fails=(10,))
    late._run.fence.check = lambda: None  # it was not taken over when this was asked
    with late.beside():
        until(late._stop.is_set)
    assert (len(late.locked), late.said, failed) == (1, [], [])
    with pytest.raises(RunTaken):
        exporter(job="ours").finish("step-00000010.a1")


def test_nothing_is_asked_again_about_what_is_exported_or_would_not_stay(exporter, tmp_path, monkeypatch):
    for step, attempt in ((10, 1), (20, 1), (20, 2), (30, 2)):
        save_box(tmp_path / "tiny", step, attempt)
    exporter("export.every_steps=10", "export.keep=1").finish("step-00000030.a2")
    asked = []
    monkeypatch.setattr(exports, "finished", lambda folder: asked.append("exports") or finished(folder))
    again = exporter("export.every_steps=10", "export.keep=1")
    monkeypatch.setattr(again._catalog, "is_committed", lambda name: asked.append(name) or True)
    for _ in range(3):
        again._look()
    asked.clear()
    assert again._look() == []
    assert asked == []


def test_a_process_makes_it_and_one_that_is_asked_to_stop_leaves_nothing(exporter, tmp_path):
    saved(tmp_path / "tiny" / "step-00000004.a1", {"tokenizer": "bytes", "attempt": 1}, ModelConfig(config=LLAMA))
    stopped = exporter(kind=Exporter)
    stopped.finish("step-00000004.a1", lambda: True)
    assert names(stopped) == []
    assert not stopped._failed
    for name in (".making-step-00000004.12ab", ".making-step-00000003", "step-00000002"):
        left = tmp_path / "tiny" / "export" / name
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes(b"half of one")
    made = exporter("export.dtype=bfloat16", kind=Exporter)
    made.finish("step-00000004.a1")
    assert names(made) == ["step-00000004"]
    assert [path.name for path in (tmp_path / "tiny" / "export").iterdir()] == ["step-00000004"]
    config = json.loads((tmp_path / "tiny" / "export" / "step-00000004" / "config.json").read_text())
    assert (config["dtype"], config["eos_token_id"]) == ("bfloat16", 256)
    assert Catalog(made._run.storage).newest().name == "step-00000004.a1"  # no export is taken for a checkpoint


class Remote:
    """Object storage: a directory in which nothing can be renamed."""

    def __init__(self, storage):
        self._storage = storage

    def __getattr__(self, name):
        return getattr(self._storage, name)


def test_without_renames_the_config_makes_it_one(tmp_path):
    checkpoint, _ = saved(tmp_path / "c", {"tokenizer": "bytes"}, ModelConfig(config=LLAMA))
    folder = Remote(LocalStorage(tmp_path / "export"))
    folder.ensure()
    folder.sub("step-00000004").ensure()
    folder.sub("step-00000004").replace("model.safetensors", b"half of one")
    assert finished(folder) == {}
    export_into(folder, checkpoint, 4, Form())
    assert finished(folder) == {4: "step-00000004"}
    assert keep_newest(folder, None) == []
    assert keep_newest(folder, 1) == []
    export_into(folder, checkpoint, 5, Form())
    assert keep_newest(folder, 1) == ["step-00000004"]
    assert folder.names() == ["step-00000005"]


@pytest.mark.parametrize(("remote", "error"), [(False, RunTaken), (False, FileNotFoundError), (True, RunTaken)])
def test_what_is_made_for_a_run_that_another_has_taken_over_is_not_published(tmp_path, remote, error):
    checkpoint, _ = saved(tmp_path / "c", {"tokenizer": "bytes"}, ModelConfig(config=LLAMA))
    folder = LocalStorage(tmp_path / "export")
    folder.ensure()
    folder = Remote(folder) if remote else folder
    ours, theirs = (RunDir(LocalStorage(tmp_path), job) for job in ("ours", "theirs"))
    ours.fence.take()
    check, began = ours.fence.check, remote

    def taken_over():  # before the last step of ours
        nonlocal began
        if began:
            began = False
            return
        ours.fence.check = check
        theirs.fence.take()
        clear(folder)
        export_into(folder, checkpoint, 4, Form(dtype="bfloat16"), theirs)
        if error is RunTaken:  # else it is taken over right afterwards
            check()

    ours.fence.check = taken_over
    with pytest.raises(error):
        export_into(folder, checkpoint, 4, Form(), ours)
    assert folder.names() == ["step-00000004"]
    assert json.loads(folder.sub("step-00000004").read("config.json"))["dtype"] == "bfloat16"


def test_what_a_killed_process_has_left_is_deleted_and_nothing_else(tmp_path):
    folder = LocalStorage(tmp_path)
    for name in (".making-step-00000004.aa", ".making-step-00000004.bb", "step-00000004", "mine"):
        folder.sub(name).make()
    discard(folder, 4, "aa")
    assert folder.names() == [".making-step-00000004.bb", "mine", "step-00000004"]
    discard(folder, 4, "aa")
    clear(folder)
    assert folder.names() == ["mine"]


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.own = inner, nn.Linear(1, 1, bias=False)

    def forward(self, x):
        return self.inner(x) * self.own.weight


class Scales(models.Adapter):
    """An adapter of one's own."""

    def __init__(self, layers):
        self._layers = layers

    def attach(self, model):
        for layer in model.model.layers[: self._layers]:
            layer.mlp.down_proj = Scaled(layer.mlp.down_proj)

    def disabled(self, model):
        return nullcontext()


def test_an_adapter_of_ones_own_is_the_one_of_the_configuration(exporter, tmp_path):
    adapter = AdapterConfig("tests.unit.driver.test_exports:Scales", {"layers": 1})
    info = {"tokenizer": "bytes", "attempt": 1, "adapter": {"name": adapter.name, "args": {"layers": 1}, "base": {}}}
    model = ModelConfig(config=LLAMA)
    saved(tmp_path / "tiny" / "step-00000004.a1", info, model, models.build_adapted(model, adapter)[0])
    made = exporter(f"adapter={{name: '{adapter.name}', args: {{layers: 1}}}}")
    threads, in_process = torch.get_num_threads(), lambda job: __main__._export(json.loads(json.dumps(job)))
    made._in_process = in_process
    try:
        made.finish("step-00000004.a1")
    finally:
        torch.set_num_threads(threads)
    assert names(made) == ["step-00000004"]
    written = safetensors.torch.load((tmp_path / "tiny/export/step-00000004/adapter_model.safetensors").read_bytes())
    assert list(written) == ["model.layers.0.mlp.down_proj.own.weight"]


def test_the_state_of_the_saves_is_that_of_their_own_cadence():
    own, also = Cadence(4), AlsoEvery(Cadence(4), 6)
    steps = []
    for step in range(1, 25):
        if own.due(step, 0):
            own.fired(step, 0)
        if also.due(step, 0):
            also.fired(step, 0)
            steps.append(step)
        assert also.state_dict() == own.state_dict()
    assert steps == [4, 6, 8, 12, 16, 18, 20, 24]


def test_exports_that_could_not_be_made_are_found_before_anything_starts(tmp_path):
    config = load(TINY, ["export={pad_token: <pad>}"])
    with pytest.raises(ConfigError, match="bytes has no token '<pad>'") as caught:
        preflight._check_export(config, ByteTokenizer())
    assert caught.value.key == "export.pad_token"
    other = replace(load(TINY, ["export={}"]), model=ModelConfig(factory="torch.nn:Identity"))
    with pytest.raises(ConfigError, match="no transformers PreTrainedModel") as caught:
        preflight._check_export(other, ByteTokenizer())
    assert caught.value.key == "export"
    with pytest.raises(ConfigError, match="adapter of a factory's model"):
        preflight._check_export(replace(other, adapter=AdapterConfig("lora")), ByteTokenizer())
    assert exports.export_form(load(TINY, ["export={}"])).tokenizer == "bytes"
