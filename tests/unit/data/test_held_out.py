"""What is held out where the hashes of documents leave one side empty."""

import json
from zlib import crc32

import pytest

from areal_ray.config import DataConfig
from areal_ray.data import build_tokenizer
from areal_ray.data.corpus import planning, prepare
from areal_ray.storage import LocalStorage
from tests.unit.data.corpora import prepared, splits, tokens

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("small", [False, True], ids=["one shard", "shards"])
def test_of_few_documents_the_one_of_the_least_hash_is_held_out(sources, tmp_path, monkeypatch, small):
    if small:
        monkeypatch.setattr(planning, "GROUP_BYTES", 100)
    train, held_out = splits(prepared(sources, tmp_path / "data", held_out=1e-9), 1)
    least = min(range(20), key=lambda i: crc32(bytes([i]) * (37 + i)))
    assert set(tokens(held_out)) == {least, 256}
    assert set(tokens(train)) == {*range(20), 256} - {least}
    assert tokens(held_out).count(least) == 37 + least


def test_of_one_document_its_last_tokens_are_held_out(tmp_path):
    (tmp_path / "one").write_bytes(bytes(range(127)))
    train, held_out = splits(prepared(tmp_path / "one", tmp_path / "data", held_out=0.1), 1)
    assert tokens(train) + tokens(held_out) == [*range(127), 256]
    assert len(held_out) == 13


def test_of_documents_that_would_all_be_held_out_one_is(sources, tmp_path):
    train, held_out = splits(prepared(sources, tmp_path / "data", held_out=1 - 1e-9), 1)
    assert set(tokens(held_out)) == {0, 256}
    assert set(tokens(train)) == {*range(1, 20), 256}
    (tmp_path / "one").write_bytes(b"a" * 99)
    train, held_out = splits(prepared(tmp_path / "one", tmp_path / "data", held_out=0.95), 1)
    assert (len(train), len(held_out)) == (5, 95)


def test_of_one_preference_nothing_is_held_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "chosen": "yes", "rejected": "no"}\n')
    config = DataConfig(source="jsonl", format="preference", held_out=0.2, paths=[str(tmp_path / "a.jsonl")])
    plan = planning.make_plan(config, build_tokenizer("bytes"), LocalStorage(tmp_path / "data"))
    manifest = prepare.prepare(plan, prepare.in_process, print)
    assert (manifest.count("train", "documents"), manifest.count("held_out", "documents")) == (1, 0)


def test_a_record_that_gives_nothing_is_no_document_and_not_held_out(tmp_path):
    records = [
        {"prompt": "p", "completion": ""},
        {"prompt": "p", "completion": "yes"},
    ]  # the former has the lesser hash
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {"on_error": "skip", "add_eos": False, "held_out": 1e-9}
    config = DataConfig(source="jsonl", format="completion", paths=[str(tmp_path / "a.jsonl")], **options)
    plan = planning.make_plan(config, build_tokenizer("bytes"), LocalStorage(tmp_path / "data"))
    corpus = prepare.prepare(plan, prepare.in_process, print)
    assert corpus.count("train", "documents") == 1
    assert corpus.count("train", "tokens") == 4  # and nothing is left of them to hold out


def test_nothing_is_held_out_if_nothing_is_to_be(sources, tmp_path):
    corpus = prepared(sources, tmp_path / "data", held_out=0.0)
    assert (len(corpus.split("held_out")), corpus.manifest.splits["held_out"]) == (0, [])
