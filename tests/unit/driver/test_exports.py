"""Exports beside training: which checkpoints, one at a time, none twice, and nothing of it in training's way."""

import json
import threading
from dataclasses import replace

import pytest

from areal_ray.checkpoint import Catalog
from areal_ray.checkpoint.read_lock import has_readers
from areal_ray.config import ConfigError, ModelConfig, load
from areal_ray.data.tokenizers import ByteTokenizer
from areal_ray.driver import exports, preflight
from areal_ray.driver.exports import Exporter
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.tools.export import Form
from areal_ray.tools.export.folder import export_into, finished, keep_newest
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
    def exporter(*overrides, kind=Made, **options):
        config = load(TINY, [f"run.storage_path={tmp_path}", "export={}", *overrides])
        said = []
        made = kind(config, RunDir(LocalStorage(tmp_path / "tiny")), (), said.append, look_s=0.01, **options)
        made.said = said
        return made

    (tmp_path / "tiny").mkdir()
    return exporter


def names(made):
    return list(finished(made._folder).values())


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


def test_a_process_makes_it_and_one_that_is_asked_to_stop_leaves_nothing(exporter, tmp_path):
    saved(tmp_path / "tiny" / "step-00000004.a1", {"tokenizer": "bytes", "attempt": 1}, ModelConfig(config=LLAMA))
    stopped = exporter(kind=Exporter)
    stopped.finish("step-00000004.a1", lambda: True)
    assert names(stopped) == []
    assert not stopped._failed
    left = tmp_path / "tiny" / "export" / ".making-step-00000004"
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
    assert exports.export_form(load(TINY, ["export={}"])).tokenizer == "bytes"
