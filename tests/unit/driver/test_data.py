"""Which corpus a run trains on: the one that it was started with, whatever becomes of the sources."""

import shutil
from dataclasses import replace

import pytest

from areal_ray.config import Config, ConfigError, DataConfig, RunConfig
from areal_ray.data import build_tokenizer
from areal_ray.driver.data import noted, prepared_corpus, sources_of
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(10):
        (tmp_path / "text" / f"{i}.txt").write_bytes(bytes([i]) * 50)
    return tmp_path / "text"


@pytest.fixture
def run(tmp_path, text):
    """A run that was started on `text`; gives (tokens that it goes on with, what was said)."""
    config = Config(
        run=RunConfig(storage_path=str(tmp_path / "runs")), data=DataConfig(source="text", paths=[str(text)])
    )
    directory = RunDir(LocalStorage(tmp_path / "runs" / "run"))
    directory.storage.ensure()

    def go(goes_on=True, allow=(), **data):
        said = []
        changed = replace(config, run=replace(config.run, allow_changes=list(allow)), data=replace(config.data, **data))
        (found,) = sources_of(changed, directory, build_tokenizer("bytes"), goes_on, said.append).values()
        return found, [line for line in said if not line.startswith("prepared data")]

    first, _ = go(goes_on=False)
    directory.write_data(noted(config, {"": first}))
    go.first, go.directory = first, directory
    go.config = config
    return go


def test_sources_that_change_change_nothing_and_are_said(run, text):
    assert run()[1] == []
    (text / "3.txt").write_bytes(b"something else")
    found, said = run()
    assert found.location == run.first.location
    assert said == [
        "data: the sources have changed since they were prepared; the run goes on with the corpus that it was started "
        "with"
    ]
    (text / "11.txt").write_bytes(b"more")
    assert run()[0].location == run.first.location
    shutil.rmtree(text)
    found, (line,) = run()
    assert found.fingerprint == run.first.fingerprint
    assert "cannot be looked at" in line


def test_a_run_without_a_checkpoint_takes_the_sources_as_they_are(run, text):
    (text / "3.txt").write_bytes(b"something else")
    assert run(goes_on=False)[0].fingerprint != run.first.fingerprint


def test_changes_of_the_data_can_be_allowed(run, text):
    (text / "3.txt").write_bytes(b"something else")
    found, said = run(allow=["data"])
    assert found.fingerprint != run.first.fingerprint
    assert said == []


def test_other_settings_are_another_corpus(run):
    assert run(held_out=0.5)[0].fingerprint != run.first.fingerprint
    assert run(prefetch_batches=7)[0].fingerprint == run.first.fingerprint


def test_a_corpus_that_was_deleted_is_prepared_again(run):
    shutil.rmtree(run.first.location)
    assert run()[0].fingerprint == run.first.fingerprint


def test_sources_that_moved_give_the_same_corpus(run, text, tmp_path):
    shutil.copytree(text, tmp_path / "elsewhere")
    found, _ = run(paths=[str(tmp_path / "elsewhere")])
    assert found.fingerprint == run.first.fingerprint


def test_a_run_on_a_corpus_that_another_has_prepared_goes_on_with_it(run, text, tmp_path):
    shutil.copytree(text, tmp_path / "elsewhere")
    mine = {"paths": [str(tmp_path / "elsewhere")]}  # of other settings, which the corpus does not have
    found, _ = run(goes_on=False, **mine)
    run.directory.write_data(noted(replace(run.config, data=replace(run.config.data, **mine)), {"": found}))
    (tmp_path / "elsewhere" / "3.txt").write_bytes(b"something else")
    found, said = run(**mine)
    assert found.fingerprint == run.first.fingerprint
    assert len(said) == 1
    assert "have changed" in said[0]


def test_a_corpus_that_is_named_itself_needs_no_sources(run, text):
    shutil.rmtree(text)
    named = replace(run.config, data=replace(run.config.data, prepared_path=run.first.location))
    assert prepared_corpus(named, build_tokenizer("bytes"), pytest.fail).fingerprint == run.first.fingerprint
    other = replace(named, data=replace(named.data, held_out=0.5))
    with pytest.raises(ConfigError, match=r"was prepared with data\.held_out=0\.05, not 0\.5"):
        prepared_corpus(other, build_tokenizer("bytes"), pytest.fail)


def test_a_folder_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    there = replace(run.config, data=replace(run.config.data, prepared_path=str(tmp_path / "file" / "data")))
    with pytest.raises(ConfigError) as caught:
        prepared_corpus(there, build_tokenizer("bytes"), print)
    assert caught.value.key == "data.prepared_path"
