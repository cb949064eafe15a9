"""Prepared corpora: written once, whole or not at all, and read by position."""

import os
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data import PackedTokens
from areal_ray.data.corpus import planning, prepare, ranges, shard
from areal_ray.data.corpus.corpus import Corpus, TokenFile, TokenStream, document_lengths
from areal_ray.data.corpus.manifest import MANIFEST
from areal_ray.data.corpus.ranges import LocalRanges, RemoteRanges
from areal_ray.data.corpus.token_file import TokenWriter, token_dtype
from areal_ray.data.dataset import IGNORED, is_same
from areal_ray.data.packing import ConcatenatedRows, concatenate
from areal_ray.data.records import Tokens
from areal_ray.storage import LocalStorage
from tests.unit.data.corpora import plan_for, prepared, splits, tokens

pytestmark = pytest.mark.unit

# Of rows of 8 tokens of `sources`, as the version before prepared corpora computed them; see test_sources.py.
OLD_TRAIN, OLD_HELD_OUT = "ce0d520260fe731f21c21f982c3efdf4", "bd3d0f462d08e8e9fd644023a4eb0c3d"


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(planning, "GROUP_BYTES", 300)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_and_old_fingerprints_are_those_of_the_version_before(sources, tmp_path, small_groups, monkeypatch):
    corpus = prepared(sources, tmp_path / "data")
    assert len(corpus.manifest.splits["train"]) > 1  # rows lie across files
    train, held_out = splits(corpus, 8)
    whole = PackedTokens(np.asarray(tokens(train), np.uint16), 8)
    assert train.old_fingerprint() == whole.fingerprint == OLD_TRAIN
    assert held_out.old_fingerprint() == OLD_HELD_OUT
    assert is_same(train, OLD_TRAIN)
    assert is_same(train, train.fingerprint)
    assert not is_same(train, OLD_HELD_OUT)
    assert not is_same(whole, train.fingerprint)
    monkeypatch.setattr(concatenate, "_MOST_BEFORE", len(train) * 8 - 1)
    assert not is_same(train, OLD_TRAIN)  # so much was never trained on then: nothing is read


def test_how_documents_are_grouped_changes_no_row(sources, tmp_path, monkeypatch):
    alone = splits(prepared(sources, tmp_path / "one"), 8)
    monkeypatch.setattr(planning, "GROUP_BYTES", 100)
    many = splits(prepared(sources, tmp_path / "many"), 8)
    assert [tokens(split) for split in alone] == [tokens(split) for split in many]


def test_the_manifest_says_what_there_is(sources, tmp_path, small_groups):
    corpus = prepared(sources, tmp_path / "data")
    manifest, total = corpus.manifest, sum(path.stat().st_size for path in sources.iterdir())
    assert manifest.count("train", "documents") + manifest.count("held_out", "documents") == 20
    assert manifest.count("train", "tokens") + manifest.count("held_out", "tokens") == total + 20
    assert manifest.largest_id == 256
    assert manifest.sources["documents"] == manifest.sources["parts"] == 20
    assert manifest.sources["bytes"] == total
    assert manifest.settings["tokenizer"] == "bytes"
    kept = {*manifest.files, "manifest.json", "sources.jsonl"}
    assert kept == set(corpus.storage.names())  # and nothing that was needed on the way


def test_token_files_are_what_megatron_reads(sources, tmp_path):
    corpus = prepared(sources, tmp_path / "data", held_out=0.0)
    data, ids = (corpus.storage.read(f"00000.train.{suffix}") for suffix in ("idx", "bin"))
    magic, version, code, sequences, bounds = struct.unpack_from("<9sQBQQ", data)
    assert (magic, version, code, sequences, bounds) == (b"MMIDIDX\x00\x00", 1, 8, 20, 21)
    lengths = np.frombuffer(data, "<i4", 20, 34)
    pointers = np.frombuffer(data, "<i8", 20, 34 + 80)
    assert lengths.tolist() == [38 + i for i in range(20)]
    assert pointers.tolist() == [0, *(np.cumsum(lengths)[:-1] * 2).tolist()]
    assert np.frombuffer(data, "<i8", 21, 34 + 240).tolist() == list(range(21))
    assert len(data) == 34 + 240 + 168
    assert np.frombuffer(ids, "<u2", 38, pointers[5])[:3].tolist() == [5, 5, 5]
    assert corpus.split("train").document_lengths().tolist() == lengths.tolist()


def test_a_tokenizer_with_many_ids_gets_wider_tokens():
    assert [token_dtype(largest).str for largest in (256, 65535, 65536)] == ["<u2", "<u2", "<i4"]


@pytest.mark.parametrize("small", [False, True], ids=["one shard", "shards"])
def test_an_interrupted_preparation_goes_on_to_the_same_bytes(sources, tmp_path, monkeypatch, small):
    if small:
        monkeypatch.setattr(planning, "GROUP_BYTES", 400)
    prepared(sources, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    files = len(expected) + small * 3  # records of groups, which are removed
    for number in range(files):
        folder = tmp_path / f"killed-{number}"
        child = os.fork()
        if child == 0:
            _die_at(number)
            prepared(sources, folder)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert not prepare.is_prepared(plan_for(sources, folder).work.storage)
        prepared(sources, folder)
        assert content(folder) == expected
        shutil.rmtree(folder)


def _die_at(number):
    """Be killed when the file of this number, counted over all that are begun, is half written."""
    create, count = LocalStorage.create_whole, iter(range(1000))

    @contextmanager
    def create_whole(self, name):
        dying = next(count) == number
        with create(self, name) as sink:
            yield sink
            sink.flush()
            if dying:
                os.kill(os.getpid(), signal.SIGKILL)

    LocalStorage.create_whole = create_whole


def test_finished_groups_are_used_again_unless_they_are_damaged(sources, tmp_path, small_groups, monkeypatch):
    expected = prepared(sources, tmp_path / "whole").fingerprint
    plan = plan_for(sources, tmp_path / "data")
    plan.work.storage.ensure()
    prepare.in_process(plan.work, plan.groups[:3], lambda *_: None)
    damaged = next(path for path in (tmp_path / "data").rglob("00001.train.bin"))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    read = []
    monkeypatch.setattr(shard, "_content", lambda document: read.append(document.origin) or document.content)
    manifest = prepare.prepare(plan, prepare.in_process, print)
    assert manifest.fingerprint == expected
    names = {part.path for group in (plan.groups[1], *plan.groups[3:]) for part in group.parts}
    assert set(read) == names


def test_two_jobs_that_prepare_the_same_do_not_harm_each_other(sources, tmp_path, small_groups):
    expected = prepared(sources, tmp_path / "whole").fingerprint
    plan = plan_for(sources, tmp_path / "data")

    def other_is_faster(work, groups, advance):
        records = prepare.in_process(work, groups[:2], advance)
        prepare.prepare(plan, prepare.in_process, print)  # the other job, from beginning to end
        return records + prepare.in_process(work, groups[2:], advance)

    manifest = prepare.prepare(plan, other_is_faster, print)
    assert manifest.fingerprint == Corpus(plan.work.storage).fingerprint == expected
    assert set(plan.work.storage.names()) == {*manifest.files, "manifest.json", "sources.jsonl"}


def test_a_secret_of_a_source_is_in_no_manifest():
    config = DataConfig(source="hub", paths=["a/b"], args={"token": "hf_x", "revision": "1"})
    assert planning.settings_of(config)["args"] == {"token": "***", "revision": "1"}
    assert planning.settings_of(config)["tokenizer"] == "bytes"


def test_tokens_that_are_not_predicted_have_no_label(tmp_path):
    storage = LocalStorage(tmp_path)
    with TokenWriter(storage, "a", np.dtype("<u2")) as writer:
        writer.begin_document()
        writer.add(Tokens(np.asarray([1, 2, 3], np.uint32)))
        writer.begin_document()
        writer.add(Tokens(np.asarray([4, 5, 6], np.uint32), np.asarray([False, True, False])))
        writer.add(Tokens(np.asarray([7, 8], np.uint32), np.asarray([True, False])))
    assert (writer.tokens, writer.predicted, writer.documents) == (8, 5, 2)
    stream = TokenStream(
        storage,
        [TokenFile("a.bin", 8, mask="a.predicted.bin")],
        np.dtype("<u2"),
        "",
        lambda: document_lengths(storage, ["a.idx"]),
    )
    assert stream.document_lengths().tolist() == [3, 5]
    rows = ConcatenatedRows(stream, 4)[np.asarray([1, 0])]
    assert rows["input_ids"].tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert rows["labels"].tolist() == [[IGNORED, 7, IGNORED, IGNORED], [2, 3, IGNORED, IGNORED]]


def test_an_id_that_a_tokenizer_should_not_have_names_it(tmp_path):
    with (
        pytest.raises(ConfigError, match="gave the id 65536"),
        TokenWriter(LocalStorage(tmp_path), "a", np.dtype("<u2")) as writer,
    ):
        writer.add(Tokens(np.asarray([65536], np.uint32)))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_shorter_than_it_was_is_named(sources, tmp_path):
    corpus = prepared(sources, tmp_path / "data")
    train, _ = splits(corpus, 8)
    path = os.path.join(corpus.storage.location, "00000.train.bin")
    os.truncate(path, 100)
    with pytest.raises(OSError, match=r"00000\.train\.bin ends before byte"):
        train[np.asarray([len(train) - 1])]


def test_ranges_through_a_cache_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "_BLOCK", 10)
    monkeypatch.setattr(ranges, "_CACHED", 60)
    (tmp_path / "a").write_bytes(bytes(range(256)))
    storage = LocalStorage(tmp_path)
    near, far = LocalRanges(storage), RemoteRanges(storage, size=256)
    draw = np.random.default_rng(0)
    for _ in range(50):
        wanted = [("a", int(begin), int(draw.integers(1, 256 - begin))) for begin in draw.integers(0, 250, 4)]
        assert far.read(wanted) == near.read(wanted)
        assert len(far._blocks) <= 6
    with pytest.raises(OSError, match="ends before byte 300"):
        far.read([("a", 250, 50)])


@pytest.mark.parametrize(("cached", "requests"), [(256, 4), (255, 26)])
def test_what_fits_into_the_cache_is_read_once_and_in_large_blocks(tmp_path, monkeypatch, cached, requests):
    monkeypatch.setattr(ranges, "_BLOCK", 10)
    monkeypatch.setattr(ranges, "_LARGE_BLOCK", 64)
    monkeypatch.setattr(ranges, "_CACHED", cached)
    (tmp_path / "a").write_bytes(bytes(range(256)))
    asked = []

    class Counted(LocalStorage):
        def read_range(self, *where):
            asked.append(where)
            return super().read_range(*where)

    far = RemoteRanges(Counted(tmp_path), size=256)
    for begin in range(250):
        assert far.read([("a", begin, 5)]) == [bytes(range(begin, begin + 5))]
    assert len(asked) == requests
    far.read([("a", 0, 1), ("a", 255, 1)])
    assert len(asked) == requests + (cached < 256)  # the oldest had to go


def test_a_manifest_that_was_changed_is_refused(sources, tmp_path):
    corpus = prepared(sources, tmp_path / "data")
    text = corpus.storage.read(MANIFEST)
    corpus.storage.replace(MANIFEST, text.replace(b'"<u2"', b'"<i4"'))
    with pytest.raises(ValueError, match="it was changed"):
        Corpus(corpus.storage)
    corpus.storage.replace(MANIFEST, text.replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(ValueError, match="of format 2"):
        Corpus(corpus.storage)
    corpus.storage.replace(MANIFEST, b'{"format": 1}')
    with pytest.raises(ValueError, match="not the manifest of a prepared corpus"):
        Corpus(corpus.storage)


def test_files_that_another_node_has_written_elsewhere_are_missed(sources, tmp_path, small_groups):
    plan = plan_for(sources, tmp_path / "data")

    def elsewhere(work, groups, advance):
        records = prepare.in_process(work, groups, advance)
        work.storage.remove("00001.train.bin")
        return records

    with pytest.raises(OSError, match=r"00001\.train\.bin was written, but is not here"):
        prepare.prepare(plan, elsewhere, print)
    assert not prepare.is_prepared(plan.work.storage)
    prepare.prepare(plan, prepare.in_process, print)


def test_progress_is_said_only_when_it_takes_long():
    said, now = [], [0.0]
    progress = prepare.Progress(100_000_000, said.append, lambda: now[0])
    progress(10_000_000, 1_000)
    assert said == []
    now[0] = 10.0
    progress(15_000_000, 49_000)
    assert said == ["preparing data: 25 of 100 MB, 5,000 tokens/s, 30 s left"]
    now[0] = 12.0
    progress(1, 1)
    assert len(said) == 1


def test_sources_that_cannot_be_read_leave_no_corpus(sources, tmp_path):
    plan = plan_for(sources, tmp_path / "data")
    (sources / "07.txt").unlink()
    with pytest.raises(ConfigError, match=r"07\.txt"):
        prepare.prepare(plan, prepare.in_process, print)
    assert plan.work.storage.names() == []


def test_a_process_that_prepares_does_without_torch_and_ray():
    code = """
import sys
import areal_ray.data.build, areal_ray.data.corpus.process_prepare, areal_ray.data.tokenizers
print([name for name in ("torch", "ray", "transformers") if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_what_the_package_names_is_there():
    import areal_ray.data

    assert {name for name in areal_ray.data.__all__ if hasattr(areal_ray.data, name)} == set(areal_ray.data.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        areal_ray.data.nothing  # noqa: B018
