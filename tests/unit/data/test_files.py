"""Files of all kinds: what is taken, what is left out and said, what is refused with file and line."""

import errno
import gzip
import json
import lzma
import os
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data.build import build_source
from areal_ray.data.corpus.shard import part_bytes
from areal_ray.data.records import Part
from areal_ray.data.sources import hub
from areal_ray.data.sources import source as source_module
from areal_ray.data.sources.source import TextFiles

pytestmark = pytest.mark.unit

LINES = [f"line {i}: the quick brown fox, größer\n" for i in range(300)]
TEXT = "".join(LINES)


class DataSet(list):
    """What `datasets` loads: rows, and a table of a thousand bytes a row."""

    @property
    def data(self):
        return SimpleNamespace(nbytes=1000 * len(self))


class FailingRemotely(TextFiles):
    def _read(self, part):
        raise OSError("slow down")


def source_of(*paths, source="text", **options):
    return build_source(DataConfig(source=source, paths=[str(path) for path in paths], **options))


def read(*paths, **options):
    """Contents of all documents, and the source that gave them."""
    source = source_of(*paths, **options)
    return [document.content for part in source.parts() for document in source.read(part)], source


def refused(*paths, **options):
    with pytest.raises(ConfigError) as caught:
        read(*paths, **options)
    return caught.value.message


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def json_lines(texts):
    return b"".join(json.dumps({"text": text, "other": [1]}).encode() + b"\n" for text in texts)


def test_hidden_files_caches_and_leftovers_are_left_out_and_said(tmp_path):
    for i in range(3):
        write(tmp_path / f"part{i}.txt", TEXT.encode())
    left_out = [".git/objects/pack/p.pack", ".git/HEAD", ".DS_Store", ".part1.txt.swp", ".ipynb_checkpoints/part0.txt"]
    for name in (*left_out, "__pycache__/a.pyc", "part0.txt~", "corpus.lock"):
        write(tmp_path / name, b"\xff\xfe\x00")
    contents, source = read(tmp_path)
    assert contents == [TEXT.encode()] * 3
    assert source.notes == ["data: left out 5 hidden, 1 of caches, 2 left by editors and tools"]
    assert read(tmp_path / "*")[0] == contents
    assert read(tmp_path / ".git" / "HEAD", on_error="skip")[1].skipped  # named itself: taken


def test_a_folder_of_nothing_else_says_what_it_has(tmp_path):
    write(tmp_path / ".hidden", b"a")
    assert "no file matches" in refused(tmp_path)
    assert "1 hidden" in refused(tmp_path)


def test_an_existing_folder_is_itself_before_it_is_a_pattern(tmp_path):
    write(tmp_path / "[v1]" / "part.txt", b"here")
    write(tmp_path / "v" / "part.txt", b"not here")
    assert read(tmp_path / "[v1]")[0] == [b"here"]


def test_a_link_to_a_file_is_the_file_under_its_own_name_and_once(tmp_path):
    write(tmp_path / "blobs" / "0a1b", json_lines(["one"]))
    write(tmp_path / "set" / "b.jsonl", json_lines(["two"]))
    (tmp_path / "set" / "a.jsonl").symlink_to(tmp_path / "blobs" / "0a1b")
    (tmp_path / "set" / "c.jsonl").symlink_to("b.jsonl")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "set")
    write(tmp_path / "set" / "notes", b"")
    contents, source = read(tmp_path / "set", source="jsonl")
    assert contents == [b"one", b"two"]
    assert source.notes == ["data: left out 1 folders that are links, 1 not .jsonl or .ndjson or .json"]
    held = source_of(tmp_path / "set", source="jsonl", held_out_paths=[str(tmp_path / "set" / "c.jsonl")])
    assert [(part.path[-7:], part.split) for part in held.parts()] == [("a.jsonl", "train"), ("c.jsonl", "held_out")]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "shut" / "a.txt", b"a")
    write(tmp_path / "b.txt", b"b")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("shut"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert refused(tmp_path) == f"cannot read {tmp_path}/shut: Permission denied"


def test_a_byte_order_mark_is_no_text_and_line_ends_are_as_configured(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read(tmp_path)[0] == [b"one\r\ntwo\rthree\n"]
    assert read(tmp_path, newlines="lf")[0] == [b"one\ntwo\nthree\n"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("on_error", ["fail", "replace"])
def test_other_encodings_are_named(tmp_path, encoding, on_error):
    text = "plain ascii\n" * 20 if encoding[-1] == "e" else TEXT
    write(tmp_path / "a.txt", text.encode(encoding))
    if on_error == "fail":
        message = refused(tmp_path)
        assert f"{tmp_path}/a.txt" in message
        assert f"this is {encoding[:6].upper()}" in message
    else:
        contents, source = read(tmp_path, on_error=on_error)
        assert contents == []
        assert source.skipped == {"that cannot be read left out": 1}


def test_invalid_utf8_is_an_error_with_file_and_line_or_skipped_or_replaced(tmp_path):
    write(tmp_path / "a.txt", b"good\n")
    write(tmp_path / "b.txt", b"one\ntwo \xe9\n")
    assert refused(tmp_path).startswith(f"{tmp_path}/b.txt:2: byte 0xe9 is no UTF-8; data.on_error=skip")
    contents, source = read(tmp_path, on_error="skip")
    assert (contents, source.skipped["that cannot be read left out"]) == ([b"good\n"], 1)
    contents, source = read(tmp_path, on_error="replace")
    assert contents == [b"good\n", "one\ntwo \ufffd\n".encode()]
    assert source.skipped["with invalid UTF-8 replaced"] == 1


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
def test_compressed_files_are_read_whatever_they_are_called(tmp_path, kind):
    content = (TEXT * 50).encode()
    codec = {"gz": gzip.compress, "xz": lzma.compress, "zst": lambda data: pa.Codec("zstd").compress(data).to_pybytes()}
    packed = codec[kind](content)
    write(tmp_path / "whole" / "a.txt", packed)
    assert read(tmp_path / "whole")[0] == [content]
    lines = codec[kind](json_lines(LINES))
    write(tmp_path / "lines" / f"a.jsonl.{kind}", lines)
    assert read(tmp_path / "lines", source="jsonl")[0] == [line.encode() for line in LINES]
    write(tmp_path / "cut" / "a.txt", packed[: len(packed) // 2])
    assert f"{tmp_path}/cut/a.txt: cannot be read, it is damaged or cut off" in refused(tmp_path / "cut")
    assert read(tmp_path / "cut", on_error="skip")[1].skipped == {"that cannot be read left out": 1}


def test_what_storage_does_not_give_is_an_error_and_never_skipped(tmp_path):
    source = source_of(write(tmp_path / "a.txt", b"a"), on_error="skip")
    (part,) = source.parts()
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*a.txt: No such file"):
        list(source.read(part))
    with pytest.raises(OSError, match="slow down"):
        list(FailingRemotely(source.config).read(Part("s3://bucket/a")))


def test_json_lines_as_text_are_one_document_and_it_says_what_they_look_like(tmp_path):
    write(tmp_path / "train.jsonl", json_lines(LINES))
    contents, source = read(tmp_path / "train.jsonl")
    assert len(contents) == 1
    assert "looks like jsonl" in source.notes[0]
    assert len(read(tmp_path / "train.jsonl", source="jsonl")[0]) == 300


@pytest.mark.parametrize("size", [1, 50, 1000, 1 << 20])
def test_parts_of_json_lines_have_each_line_once(tmp_path, monkeypatch, size):
    monkeypatch.setattr(source_module, "PART_BYTES", size)
    write(tmp_path / "a.jsonl", json_lines(["ö" * i for i in range(1, 60)] + ["last"]).rstrip(b"\n"))
    contents, source = read(tmp_path, source="jsonl")
    assert contents == [("ö" * i).encode() for i in range(1, 60)] + [b"last"]
    assert len(source.parts()) == -(-(tmp_path / "a.jsonl").stat().st_size // size)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": 3}', "field 'text' is no text: int"),
        (b'{"body": "a"}', "without field 'text', which has body; data.fields={text: ...}"),
        (b'{"text": "a"', "this is no JSON"),
        (b'["a"]', "this is a list"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "byte 0xff is no UTF-8"),
        (b"[" * 100_000, "this is no JSON"),
    ],
)
def test_a_record_that_is_none_is_an_error_with_file_and_line_or_counted(tmp_path, line, why):
    write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + line + b'\n{"text": "also"}\n{"text": ""}\n')
    message = refused(tmp_path, source="jsonl")
    assert message.startswith(f"{tmp_path}/a.jsonl:3: ")
    assert why in message
    contents, source = read(tmp_path, source="jsonl", on_error="skip")
    assert contents == [b"good", b"also"]
    assert source.skipped == {"that cannot be read left out": 1, "empty left out": 1}


def test_csv_has_quotes_and_line_ends_in_fields_and_a_field_of_any_length(tmp_path):
    long = "x" * 200_000
    write(tmp_path / "a.csv", f'id,body\n1,"say ""hi"",\nthere"\n2,{long}\n'.encode())
    write(tmp_path / "notes.md", b"not a table")
    contents, source = read(tmp_path, source="csv", fields={"text": "body"})
    assert contents == [b'say "hi",\nthere', long.encode()]
    assert source.notes == ["data: left out 1 not .csv or .tsv"]
    content = b'id,text\n1,"one\n\xff\ntwo"\n2,three\n'
    write(tmp_path / "a.csv", content)
    assert "a.csv:3: byte 0xff is no UTF-8" in refused(tmp_path, source="csv")
    contents, source = read(tmp_path, source="csv", on_error="skip")
    assert (contents, source.skipped) == ([b"three"], {"that cannot be read left out": 1})
    assert read(tmp_path, source="csv", on_error="replace")[0] == ["one\n\ufffd\ntwo".encode(), b"three"]
    write(tmp_path / "a.csv", b'id,text\n1,one\n2,"two')
    contents, source = read(tmp_path, source="csv", on_error="skip")
    assert contents == [b"one"]
    assert source.skipped == {"files that cannot be read to the end left out from there": 1}
    write(tmp_path / "a.csv", b"id,text\n1,a,b\n")
    assert f"{tmp_path}/a.csv:2: 3 fields, where the first line names 2" in refused(tmp_path, source="csv")


def test_parquet_is_read_by_row_groups_each_once(tmp_path, monkeypatch):
    rows = [{"text": line, "n": i} for i, line in enumerate(LINES)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=40)
    monkeypatch.setattr(source_module, "PART_BYTES", 1000)
    contents, source = read(tmp_path, source="parquet")
    assert len(source.parts()) > 3
    assert contents == [line.encode() for line in LINES]
    write(tmp_path / "b.parquet", b"PAR1 and no more")
    assert f"{tmp_path}/b.parquet" in refused(tmp_path, source="parquet")


def test_folders_that_datasets_has_saved_are_read_as_they_are(tmp_path):
    table = pa.Table.from_pylist([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    with (
        pa.OSFile(str(tmp_path / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    write(tmp_path / "state.json", b"{}")
    assert read(tmp_path, source="parquet")[0] == [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}]


def test_records_have_the_fields_of_their_format_and_of_tables_nothing_that_is_none(tmp_path):
    chat = [
        {"role": "user", "content": "hi", "args": None},
        {"role": "tool", "content": "a", "args": {"x": 1, "y": None}},
    ]
    write(tmp_path / "a.jsonl", json.dumps({"conversation": chat, "id": 1}).encode())
    options = {"format": "messages", "fields": {"messages": "conversation"}}
    assert read(tmp_path, source="jsonl", **options)[0] == [{"messages": chat}]
    pq.write_table(pa.Table.from_pylist([{"conversation": chat, "id": 1}]), tmp_path / "a.parquet")
    without = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "a", "args": {"x": 1}}]
    assert read(tmp_path, source="parquet", **options)[0] == [{"messages": without}]


def test_the_standard_library_has_pairs_of_docstring_and_body():
    source = build_source(DataConfig(format="completion"))
    part = next(part for part in source.parts() if part.path.endswith("/textwrap.py"))
    pairs = {document.content["prompt"]: document.content["completion"] for document in source.read(part)}
    prompt = next(prompt for prompt in pairs if prompt.startswith("def dedent(text):"))
    assert "Remove any common leading whitespace" in prompt
    assert "margin" in pairs[prompt]
    assert '"""' not in pairs[prompt]


def test_data_sets_of_the_hub_are_read_by_parts_of_rows(monkeypatch):
    rows = DataSet({"text": f"{i}", "n": None} for i in range(7))
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        if name == "gone":
            raise FileNotFoundError("not there")
        return rows if options["split"] == "train" else DataSet(rows[:1])

    config = {"source": "hub", "held_out_paths": ["some/name#test"], "args": {"revision": "1"}}
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package datasets" in refused("some/name", **config)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(hub, "_ROWS", 3)
    source = source_of("some/name", **config)
    parts = source.parts()
    assert [(part.begin, part.end, part.split) for part in parts[:3]] == [
        (0, 3, "train"),
        (3, 6, "train"),
        (6, 7, "train"),
    ]
    assert parts[3].split == "held_out"
    assert [part_bytes(part) for part in parts] == [3000, 3000, 1000, 1000]  # not of rows, of which there are few
    assert [d.content for part in parts for d in source.read(part)] == [b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"0"]
    assert asked[0] == ("some/name", {"split": "train", "revision": "1"})
    assert "'gone' cannot be loaded: FileNotFoundError: not there" in refused("gone", **config)
