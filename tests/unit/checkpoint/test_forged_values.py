"""Values of other types than their readers take are damage, in one line, whatever their checksums say."""

import json
from pathlib import Path

import pytest

from areal_ray.checkpoint import Catalog, CheckpointDamaged, Manifest, StoredState, load, read_manifest
from areal_ray.checkpoint.format.manifest import FileRecord
from areal_ray.distributed import RankError, Ranks
from areal_ray.storage import LocalStorage
from areal_ray.tools.checkpoints import listing

from .boxes import Box, damage_found, forge, load_box, of_format_1, save_box, weights

pytestmark = pytest.mark.unit


@pytest.fixture
def directory(tmp_path):
    return save_box(tmp_path, **weights(), count=7)


def deep(levels):
    return b'{"box": ' + b'{"a": ' * levels + b"1" + b"}" * levels + b"}"


@pytest.mark.parametrize("levels", [200, 900])
def test_what_python_parses_and_then_stumbles_over_is_damage(directory, levels):
    forge(directory, "state.json", deep(levels))
    assert damage_found(directory).startswith("state.json: not readable (more than ")
    with pytest.raises(CheckpointDamaged):
        StoredState(directory)


@pytest.mark.parametrize("value", ["7", None, [7], {"a": 7}, True])
def test_a_value_of_another_type_is_damage(directory, value):
    forge(directory, "state.json", json.dumps({"box": {"count": value}}).encode())
    assert damage_found(directory).startswith("state.json: box.count is a ")


def test_a_number_may_become_a_fraction_and_none_anything(directory):
    forge(directory, "state.json", b'{"box": {"count": 7.5}}')
    assert load_box(directory).tree["count"] == 7.5
    box = Box(**weights(), count=None)
    load(directory, {"box": box}, Ranks())
    assert box.tree["count"] == 7.5


@pytest.mark.parametrize("state", [b'{"box": 7}', b'{"box": [1]}', b'{"other": null}'])
def test_values_of_an_object_that_are_none_are_damage(directory, state):
    forge(directory, "state.json", state)
    assert damage_found(directory) == "state.json: not the values of objects"


class Counter:
    """Cannot do without its number; says what it does not want."""

    step = 3

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        if state["step"] < 0:
            raise ValueError("of other data")
        self.step = state["step"]


def with_counter(directory, state):
    forge(directory, "state.json", state)
    counter = Counter()
    load(directory, {"box": Box(**weights(), count=0), "counter": counter}, Ranks())
    return counter


def test_a_value_that_is_not_there_is_damage(directory):
    assert with_counter(directory, b'{"box": {"count": 1}, "counter": {"step": 5}}').step == 5
    with pytest.raises(
        RankError, match=r"state.json: 'counter' cannot go on from its values \(KeyError: 'step'\)"
    ) as e:
        with_counter(directory, b'{"box": {"count": 1}, "counter": {}}')
    assert e.value.only(CheckpointDamaged)


def test_what_an_object_says_against_its_values_is_no_damage(directory):
    with pytest.raises(ValueError, match="of other data"):
        with_counter(directory, b'{"box": {"count": 1}, "counter": {"step": -1}}')


def forge_info(directory, **info):
    manifest = read_manifest(directory)
    changed = Manifest({**manifest.info, **info}, manifest.files, manifest.format)
    Path(directory.location, "manifest.json").write_bytes(changed.encode())


INFOS = [
    {"step": True},
    {"time": "noon"},
    {"time": float("nan")},
    {"time": 1e300},
    {"world_size": -2},
    {"world_size": 2.5},
    {"config": 7},
    {"versions": ["2.13"]},
    {"mesh": "two"},
    {"metrics": {"loss": "low"}},
    {"metrics": [1]},
    {"hf_config": "qwen"},
    {"tokenizer": ["bytes"]},
]


@pytest.mark.parametrize("info", INFOS, ids=str)
def test_info_of_another_type_is_damage(directory, tmp_path, info):
    forge_info(directory, **info)
    assert damage_found(directory).startswith("manifest.json: not readable (ValueError: ")
    (row,) = listing(LocalStorage(tmp_path))
    assert row["state"].startswith("manifest.json: not readable")


@pytest.mark.parametrize("info", INFOS, ids=str)
def test_a_row_of_the_index_of_another_type_does_not_count(directory, tmp_path, info):
    catalog = Catalog(LocalStorage(tmp_path))
    catalog.write_index(catalog.summaries())
    path = tmp_path / "checkpoints.json"
    index = json.loads(path.read_text())
    index["checkpoints"]["step-00000001.a1"]["info"].update(info)
    path.write_text(json.dumps(index))
    (row,) = listing(LocalStorage(tmp_path))
    assert (row["state"], row["saved"]) == ("good", None)


@pytest.mark.parametrize("text", [b'{"format": 1, "checkpoints": ' + b"[" * 5000, b"[" * 100_000])
def test_a_deep_index_does_not_count(directory, tmp_path, text):
    (tmp_path / "checkpoints.json").write_bytes(text)
    assert len(listing(LocalStorage(tmp_path))) == 1


def test_an_index_with_an_infinite_size_does_not_count(directory, tmp_path):
    text = '{"format": 1, "checkpoints": {"step-00000001.a1": {"info": {}, "bytes": 1e999, "stamp": 1}}}'
    (tmp_path / "checkpoints.json").write_text(text)
    assert len(listing(LocalStorage(tmp_path))) == 1


def test_more_bytes_of_tensors_than_of_files_are_damage_before_memory_is_asked_for(directory):
    cuts = [{"shards": [0], "offsets": [[0]], "lengths": [[2**40]]}]
    layout = {"format": 1, "shards": 1, "cuts": cuts, "tensors": [["box.weight", "float32", [2**40], 0]]}
    forge(directory, "layout.json", json.dumps(layout).encode())
    with pytest.raises(CheckpointDamaged, match=r"^layout\.json: tensors of \d+ bytes, in files of \d+"):
        StoredState(directory)


@pytest.mark.parametrize("dtype", ["qint8", "quint4x2", "bits8"])
def test_types_with_which_nothing_can_be_done_are_damage(directory, dtype):
    layout = json.loads(directory.read("layout.json"))
    layout["tensors"][0][1] = dtype
    forge(directory, "layout.json", json.dumps(layout).encode())
    with pytest.raises(CheckpointDamaged, match=r"^layout\.json: this torch has no type"):
        StoredState(directory)


@pytest.mark.parametrize(
    "change",
    [(0, -1), (0, 2**63), (1, 2**40), (1, -5), (0, "0"), (1, 1.5), (2, "zz"), (2, 7), (2, "f" * 17)],
    ids=str,
)
def test_checksums_of_format_1_that_cannot_be_are_damage(tmp_path, change):
    directory = of_format_1(tmp_path)
    manifest = read_manifest(directory)
    column, value = change
    files = dict(manifest.files)
    for name in ("shard-00000.distcp", "shard-00001.distcp"):
        old = files[name]
        chunks = [[*chunk[:column], value, *chunk[column + 1 :]] for chunk in old.chunks]
        files[name] = FileRecord(old.size, old.xxh3_128, chunks)
    Path(directory.location, "manifest.json").write_bytes(Manifest(manifest.info, files, 1).encode())
    with pytest.raises(CheckpointDamaged, match=r"^(manifest\.json|\.metadata|shard-0000\d\.distcp): "):
        StoredState(directory)
