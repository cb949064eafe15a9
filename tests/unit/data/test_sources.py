"""Documents and their split: by name, the same wherever the corpus lies."""

import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data import build_tokenizer, load_splits
from areal_ray.data.build import build_source
from areal_ray.data.sources.files import find

pytestmark = pytest.mark.unit

END = 256


def write_corpus(folder, count=40, length=64):
    """Document i consists of the byte i."""
    for i in range(count):
        path = folder / ("notes" if i % 2 else "wiki/deep") / f"{i:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([i]) * length)
    return folder


def splits(*paths, held_out=0.25, seq_len=8, batch=2):
    config = DataConfig(source="text", paths=[str(path) for path in paths], held_out=held_out)
    return load_splits(config, build_tokenizer("bytes"), seq_len, batch)


def tokens(split):
    return split[np.arange(len(split))]["input_ids"].flatten().tolist()


def names(*paths):
    return [file.name for file in find([str(path) for path in paths]).found]


def test_byte_tokens_make_the_round_trip_with_an_end_token():
    tokenizer = build_tokenizer("bytes")
    document = bytes(range(256)) + "größer".encode()
    encoded = tokenizer.encode(document)
    assert tokenizer.vocab_size == 257
    assert encoded[-1] == END
    assert encoded.max() == END
    assert bytes(encoded[:-1].astype(np.uint8)) == document
    assert tokenizer.encode(b"").tolist() == [END]


def test_a_tokenizer_that_cannot_be_loaded_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError) as caught:
        build_tokenizer(str(tmp_path))
    assert caught.value.key == "data.tokenizer"


def test_the_standard_library_is_split_by_file():
    config = DataConfig(held_out=0.05)
    train, held_out = load_splits(config, build_tokenizer("bytes"), 256, 8)
    source = build_source(config)
    root = Path(sysconfig.get_paths()["stdlib"])
    read = [document for part in source.parts() for document in source.read(part)]
    files = {Path(document.origin).relative_to(root).as_posix(): document.content for document in read}
    assert "json/decoder.py" in files
    assert not any("test" in name.split("/") or "site-packages" in name for name in files)
    assert 0.01 < len(held_out) / (len(train) + len(held_out)) < 0.15
    ends = tokens(train).count(END) + tokens(held_out).count(END)
    assert len(files) - 4 <= ends <= len(files)  # every file is on one side, whole; but for the two cut ends
    total = sum(len(content) + 1 for content in files.values())
    assert total - 2 * 256 < 256 * (len(train) + len(held_out)) <= total


def test_a_document_is_on_one_side_only_and_whole(tmp_path):
    train, held_out = splits(write_corpus(tmp_path), seq_len=1)
    train, held_out = tokens(train), tokens(held_out)
    assert set(train) & set(held_out) == {END}
    assert set(train) | set(held_out) == {*range(40), END}
    assert all((train + held_out).count(i) == 64 for i in range(40))
    assert 3 <= len(set(held_out)) - 1 <= 20


def test_the_split_does_not_depend_on_where_the_corpus_lies(tmp_path):
    here = write_corpus(tmp_path / "here")
    there = tmp_path / "somewhere" / "else" / "entirely"
    shutil.copytree(here, there)
    first, second = splits(here), splits(there)
    assert [split.fingerprint for split in first] == [split.fingerprint for split in second]


def test_the_order_does_not_depend_on_how_the_files_are_named_in_the_config(tmp_path):
    corpus = write_corpus(tmp_path)
    whole = names(corpus)
    assert whole == sorted(whole)
    assert whole[0] == "notes/001.txt"
    assert len(whole) == 40
    assert names(corpus / "**" / "*.txt") == whole
    assert names(corpus / "wiki", corpus / "notes" / "*.txt", corpus / "notes") == whole


def test_a_document_keeps_its_side_when_others_of_its_folder_go(tmp_path):
    before = [set(tokens(split)) for split in splits(write_corpus(tmp_path), seq_len=1)]
    for i in range(0, 40, 3):
        next(tmp_path.rglob(f"{i:03}.txt")).unlink()
    after = [set(tokens(split)) for split in splits(tmp_path, seq_len=1)]
    gone = set(range(0, 40, 3))
    assert after == [side - gone for side in before]


def test_a_document_keeps_its_side_when_another_folder_comes(tmp_path):
    write_corpus(tmp_path / "corpus")
    before = [set(tokens(split)) for split in splits(tmp_path / "corpus" / "notes", seq_len=1)]
    after = [
        set(tokens(split)) for split in splits(tmp_path / "corpus" / "notes", tmp_path / "corpus" / "wiki", seq_len=1)
    ]
    assert before[0] <= after[0]
    assert before[1] <= after[1]


def test_of_two_documents_one_is_held_out(tmp_path):
    (tmp_path / "one").write_bytes(b"1" * 100)
    (tmp_path / "two").write_bytes(b"2" * 100)
    train, held_out = splits(tmp_path, held_out=1e-9)
    assert {frozenset(tokens(train)) - {END}, frozenset(tokens(held_out)) - {END}} == {
        frozenset(b"1"),
        frozenset(b"2"),
    }


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({}, "no file matches"),
        ({"empty": b"", "void": b""}, "give 0 sequences"),
        ({"short": b"abc", "brief": b"abc"}, "but a global batch takes 2"),
    ],
    ids=["missing", "empty", "too short"],
)
def test_too_little_text_is_a_config_error(tmp_path, files, part):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        splits(tmp_path)
    assert caught.value.key == "data.paths"
    assert part in caught.value.message


@pytest.mark.parametrize("pattern", ["nothing", "*.md", "deep/**/*.txt"])
def test_a_pattern_that_matches_nothing_is_a_config_error_also_beside_one_that_does(tmp_path, pattern):
    corpus = write_corpus(tmp_path)
    with pytest.raises(ConfigError, match="no file matches") as caught:
        splits(corpus, tmp_path / pattern)
    assert caught.value.key == "data.paths"
    assert pattern in caught.value.message


def test_named_files_are_held_out_and_are_in_no_row_to_train_on(tmp_path):
    write_corpus(tmp_path)
    config = DataConfig(source="text", paths=[str(tmp_path)], held_out_paths=[str(tmp_path / "wiki")])
    train, held_out = load_splits(config, build_tokenizer("bytes"), 1, 2)
    assert set(tokens(train)) == {*range(1, 40, 2), END}
    assert set(tokens(held_out)) == {*range(0, 40, 2), END}
