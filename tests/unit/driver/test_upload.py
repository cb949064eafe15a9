"""What a submitted job takes along."""

import os

import pytest

from areal_ray.config import ConfigError, load
from areal_ray.driver.jobs import upload as uploading
from areal_ray.driver.jobs.upload import upload

pytestmark = pytest.mark.unit


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    (folder / "sub").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "sub" / "experiment.yaml").write_text("run: {name: inside}")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def elsewhere(tmp_path):
    folder = tmp_path / "elsewhere"
    (folder / "experiments").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "model" / "own.yaml").write_text("config: {model_type: qwen3, hidden_size: 32}")
    text = "defaults: [{model: tiny}]\nrun: {name: 007}\ntrain: {steps: 7}\noptim: {lr: '${oc.env:NO_SUCH,0.5}'}"
    (folder / "experiments" / "far.yaml").write_text(text)
    (folder / "experiments" / "parts.py").write_text("A = 1")
    return folder / "experiments" / "far.yaml"


def test_an_absolute_path_below_the_folder_becomes_a_relative_one(here):
    with upload(str(here / "sub" / "experiment.yaml"), ["a=1"]) as taken:
        assert (taken.folder, taken.config, taken.overrides) == (here, "sub/experiment.yaml", ("a=1",))


def test_an_experiment_elsewhere_comes_along_whole_with_its_groups_and_parts(here, elsewhere, monkeypatch):
    overrides = ["model=own", "train.seq_len=64"]
    with upload(str(elsewhere), overrides) as taken:
        assert (taken.folder / "notes.txt").read_text() == "mine"
        assert (taken.folder / "submitted_experiment" / "parts.py").read_text() == "A = 1"
        assert taken.overrides == ("train.seq_len=64",)
        there = load(str(taken.folder / taken.config), taken.overrides)
        assert there == load(str(elsewhere), overrides)
        assert (there.run.name, there.model.config["hidden_size"]) == ("007", 32)
        assert "oc.env" in (taken.folder / taken.config).read_text()  # of the node, not of this machine
        folder = taken.folder
    assert not folder.exists()
    assert (here / "notes.txt").exists()


def test_a_folder_that_is_too_large_names_its_largest_files_before_anything_is_sent(here, monkeypatch):
    monkeypatch.setattr(uploading, "LIMIT_BYTES", 1 << 20)
    (here / "weights.bin").write_bytes(os.urandom(2 << 20))
    with pytest.raises(ConfigError, match=r"largest files are weights\.bin \(2 MB\).*\.rayignore"):
        upload("sub/experiment.yaml", []).__enter__()
    (here / ".rayignore").write_text("*.bin\n")
    with upload("sub/experiment.yaml", []):
        pass
    (here / "zeros.txt").write_bytes(bytes(2 << 20))  # small once it is compressed
    with upload("sub/experiment.yaml", []):
        pass
