"""areal-ray prepare and areal-ray data: what is prepared, and how it is looked at."""

import json
from pathlib import Path

import numpy as np
import pytest

from areal_ray.cli.main import main
from areal_ray.data.corpus.manifest import Manifest, Shard
from areal_ray.data.corpus.token_file import TokenWriter
from areal_ray.data.records import Tokens
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit

TINY = str(Path(__file__).parents[3] / "conf" / "experiments" / "tiny.yaml")


@pytest.fixture
def corpus(tmp_path, capsys):
    """The folder of corpora with one of twenty documents, and its own folder."""
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i:02}").write_text(f"document {i} " * 5)
    overrides = ["data=text", f"data.paths=[{tmp_path}/text]", f"run.storage_path={tmp_path}/runs"]
    assert main(["prepare", "--config", TINY, *overrides]) == 0
    said = capsys.readouterr().out
    assert main(["prepare", "--config", TINY, *overrides]) == 0
    assert "prepared data: 20 documents" in said
    again = capsys.readouterr().out
    assert "prepared data" not in again  # it was there
    assert "documents to train on" in again
    (found,) = (tmp_path / "runs" / "data").iterdir()
    assert str(found) in again
    return found


def output(capsys, *command):
    assert main(["data", *map(str, command)]) == 0
    return capsys.readouterr().out


def test_corpora_are_found_by_folder_by_name_and_by_run(corpus, capsys, tmp_path):
    line = f"{corpus.name:<16} text                 20"
    run = RunDir(LocalStorage(tmp_path / "runs" / "mine"))
    run.storage.ensure()
    run.write_data({"": {"path": str(corpus), "fingerprint": "x"}})
    for path in (corpus, corpus.parent, run.storage.location):
        assert line in output(capsys, "ls", path)
    (row,) = json.loads(output(capsys, "ls", corpus, "--json"))
    assert (row["documents"], row["tokens"]) == (20, sum(len(f"document {i} ") * 5 + 1 for i in range(20)))
    assert main(["data", "ls", str(tmp_path)]) == 1
    assert "no prepared corpus" in capsys.readouterr().err
    run.write_data({"": {"path": str(tmp_path / "text"), "fingerprint": "x"}})  # of tokens of others
    assert main(["data", "ls", run.storage.location]) == 1
    assert "the run trains on no prepared corpus" in capsys.readouterr().err


def test_what_a_corpus_was_made_of_is_shown(corpus, capsys):
    found = json.loads(output(capsys, "inspect", corpus, "--json"))[corpus.name]
    assert found["settings"]["source"] == "text"
    assert found["sources"]["documents"] == found["train"]["documents"] + found["held_out"]["documents"] == 20
    assert found["largest id"] == 256
    assert found["versions"]["areal_ray"]
    assert "fingerprint" in output(capsys, "inspect", corpus)


def test_damage_is_found(corpus, capsys):
    assert "good" in output(capsys, "verify", corpus)
    data = bytearray((corpus / "00000.train.bin").read_bytes())
    data[7] ^= 1
    (corpus / "00000.train.bin").write_bytes(data)
    (corpus / "00000.held_out.idx").unlink()
    assert main(["data", "verify", str(corpus)]) == 1
    assert "damaged: 00000.train.bin, 00000.held_out.idx" in capsys.readouterr().out


def test_samples_show_documents_whole_and_the_same_for_a_seed(corpus, capsys):
    text = output(capsys, "sample", corpus, "--count", 2)
    assert text.count("── document") == 2
    assert text.count("<|endoftext|>") == 2
    assert "all tokens are predicted" in text
    assert text == output(capsys, "sample", corpus, "--count", 2)
    assert text != output(capsys, "sample", corpus, "--count", 2, "--seed", 1)
    assert "…" in output(capsys, "sample", corpus, "--tokens", 5)
    (sample, _) = json.loads(output(capsys, "sample", corpus, "--tokens", 5, "--count", 2, "--json"))[corpus.name]
    assert sample["cut"] is True


def test_samples_mark_what_is_predicted(tmp_path, capsys):
    storage = LocalStorage(tmp_path)
    with TokenWriter(storage, "a", np.dtype("<u2")) as writer:
        writer.begin_document()
        ids = np.frombuffer(b"ask: answer", np.uint8).astype(np.uint32)
        writer.add(Tokens(ids, np.arange(len(ids)) > 4))
    shard = Shard("a", writer.tokens, 1, writer.predicted, writer.largest_id, writer.files())
    settings = {"source": "jsonl", "tokenizer": "bytes", "held_out": 0.0}
    Manifest(settings, "", "<u2", {}, {"train": [shard], "held_out": []}, {}).write(storage)
    text = output(capsys, "sample", tmp_path)
    assert "ask: ⟦answer⟧" in text
    assert "are marked" in text
