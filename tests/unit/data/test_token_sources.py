"""Tokens that others have prepared: Megatron's pairs of files and directories of `datasets`."""

import json

import numpy as np
import pyarrow as pa
import pytest

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data import build_tokenizer, load_splits
from areal_ray.data.corpus.arrow import ArrowTokens
from areal_ray.data.corpus.megatron import MegatronPairs
from areal_ray.data.corpus.token_file import index

pytestmark = pytest.mark.unit


def write_pair(stem, lengths, dtype="<u2", first=0):
    ids = np.arange(first, first + sum(lengths), dtype=dtype)
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".bin").write_bytes(ids.tobytes())
    stem.with_suffix(".idx").write_bytes(index(np.asarray(lengths), np.dtype(dtype)))
    return str(stem)


def whole(source, split):
    stream = source.split(split)
    return stream.read(np.asarray([0]), len(stream))[0].tolist()


def test_pairs_are_one_stream_in_the_order_given(tmp_path):
    a, b = write_pair(tmp_path / "x" / "a", [3, 4]), write_pair(tmp_path / "y" / "b", [5], first=100)
    source = MegatronPairs([f"{b}.bin", a], held_out=0.25)
    everything = [*range(100, 105), *range(7)]
    assert whole(source, "train") == everything[:9]
    assert whole(source, "held_out") == everything[9:]
    assert MegatronPairs([b, a]).split("train").document_lengths().tolist() == [5, 3, 4]
    lengths = [source.split(name).document_lengths().tolist() for name in ("train", "held_out")]
    assert lengths == [[5, 3, 1], [0, 3]]  # of the documents of the file that was cut
    assert source.about("train") == "9 tokens"
    apart = MegatronPairs([a], [f"{b}.idx"], held_out=0.25)
    assert (whole(apart, "train"), whole(apart, "held_out")) == (everything[5:], everything[:5])


def test_pairs_have_a_fingerprint_of_their_content(tmp_path):
    first = MegatronPairs([write_pair(tmp_path / "a", [30, 40])])
    same = MegatronPairs([write_pair(tmp_path / "there" / "b", [30, 40])])
    other = MegatronPairs([write_pair(tmp_path / "c", [30, 40], first=1)])
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert first.split("train").fingerprint != first.split("held_out").fingerprint
    a, b, c = (str(tmp_path / name) for name in ("a", "there/b", "c"))
    assert MegatronPairs([a, b], [c]).fingerprint != MegatronPairs([a], [b, c]).fingerprint


@pytest.mark.parametrize(
    ("harm", "part"),
    [
        (lambda stem: stem.with_suffix(".bin").write_bytes(b"1234"), "has 2 tokens, but its .idx speaks of 7"),
        (lambda stem: stem.with_suffix(".bin").unlink(), "there is no .*a.bin beside its .idx"),
        (lambda stem: stem.with_suffix(".idx").unlink(), "there is no .*a.idx"),
        (lambda stem: stem.with_suffix(".idx").write_bytes(b"something else entirely, of some length"), "is no index"),
    ],
    ids=["short", "no bin", "no idx", "no index"],
)
def test_a_pair_that_is_none_is_a_config_error(tmp_path, harm, part):
    stem = write_pair(tmp_path / "a", [3, 4])
    harm(tmp_path / "a")
    with pytest.raises(ConfigError, match=part) as caught:
        MegatronPairs([stem])
    assert caught.value.key == "data.paths"


def test_pairs_of_different_types_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="different types"):
        MegatronPairs([write_pair(tmp_path / "a", [3]), write_pair(tmp_path / "b", [3], "<i4")])


def test_rows_of_pairs_need_no_preparation(tmp_path):
    config = DataConfig(source="megatron", paths=[write_pair(tmp_path / "a", [50, 50])], held_out=0.2)
    train, held_out = load_splits(config, build_tokenizer("bytes"), 8, 2)
    assert train[np.asarray([1])]["input_ids"].tolist() == [list(range(8, 16))]
    assert held_out[np.asarray([0])]["input_ids"].tolist() == [list(range(80, 88))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def write_arrow(folder, batches, column="input_ids", kind=None, state=()):
    """As `Dataset.save_to_disk` does: Arrow's stream format in files that state.json lists."""
    folder.mkdir(parents=True)
    schema = pa.schema([("id", pa.int64()), (column, kind or pa.list_(pa.int32()))])
    names = []
    for number, part in enumerate(batches):
        names.append(f"data-{number:05}-of-{len(batches):05}.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for rows in part:
                columns = [pa.array(range(len(rows)), pa.int64()), pa.array(rows, schema.field(1).type)]
                writer.write_batch(pa.record_batch(columns, schema=schema))
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "ab", **dict(state)}))
    return str(folder)


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.uint16()])
def test_tokens_of_arrow_files_are_read_in_place(tmp_path, kind):
    batches = [[[[1, 2], [3]], [[], [4, 5, 6]]], [[[7]]]]
    folder = write_arrow(tmp_path / "set", batches, kind=pa.list_(kind))
    source = ArrowTokens([folder], held_out=0.3)
    assert whole(source, "train") == [1, 2, 3, 4, 5]
    assert whole(source, "held_out") == [6, 7]
    other = write_arrow(tmp_path / "other", [[[[8, 9]]]], kind=pa.list_(kind), state={"_fingerprint": "cd"}.items())
    both = ArrowTokens([folder], [other])
    assert (whole(both, "train"), whole(both, "held_out")) == ([*range(1, 8)], [8, 9])
    assert both.fingerprint != source.fingerprint
    assert ArrowTokens([folder, folder], [other]).fingerprint != ArrowTokens([folder], [folder, other]).fingerprint


@pytest.mark.parametrize(
    ("made", "part"),
    [
        ({"column": "text", "kind": pa.string(), "batches": [[["a", "b"]]]}, "has no column input_ids"),
        ({"column": "input_ids", "kind": pa.string(), "batches": [[["a"]]]}, "not a list of integers"),
        ({"batches": [[[[1], None]]]}, "none of them missing"),
        ({"batches": [[[[1]]]], "state": [("_indices_data_files", ["x"])]}, "flatten_indices"),
        ({"batches": [[]]}, "has no rows"),
    ],
    ids=["text", "strings", "missing", "selection", "empty"],
)
def test_a_directory_without_tokens_is_a_config_error(tmp_path, made, part):
    folder = write_arrow(tmp_path / "set", **made)
    with pytest.raises(ConfigError, match=part):
        ArrowTokens([folder])


def test_of_several_splits_one_must_be_named(tmp_path):
    write_arrow(tmp_path / "set" / "train", [[[[1]]]])
    write_arrow(tmp_path / "set" / "test", [[[[1]]]])
    with pytest.raises(ConfigError, match=r"of its splits \(test, train\) name one"):
        ArrowTokens([str(tmp_path / "set")])
