"""Saving and loading through the engine: nothing lost, at any world size."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from areal_ray.checkpoint import read_manifest
from areal_ray.engine import SaveLoadMeta
from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints
from tests.distributed.ranks import run_ranks
from tests.distributed.small import differing, erase, evaluate, snapshot, start_engine, train

pytestmark = pytest.mark.distributed

FORMATS = [("dcp", True), ("dcp", False), ("hf", True), ("hf", False)]


def meta(root: str, weight_format: Any, with_optim: bool) -> SaveLoadMeta:
    return SaveLoadMeta(f"{root}/{weight_format}{'-optim' if with_optim else ''}", weight_format, with_optim)


def digests(root: str) -> list[str]:
    """Of the DCP part of each format that there is: the optimizer alone in the case of `hf`."""
    parts = (f"{root}/dcp-optim", f"{root}/dcp", f"{root}/hf-optim/optim")
    return [checkpoints.digest(LocalStorage(part)) for part in parts]


def round_trips(rank: int, root: str) -> dict[Any, Any]:
    """After two steps: save and go on; then, in each format, erase everything, load, and go on again."""
    engine = start_engine()
    train(engine, seed=0)
    train(engine, seed=1)
    for format in FORMATS:
        engine.save(meta(root, *format))
    saved = snapshot(engine)
    stats, continued = train(engine, seed=2), snapshot(engine)
    seen: dict[Any, Any] = {"saved": saved}
    for format in FORMATS:
        erase(engine)
        erased = snapshot(engine)
        engine.load(meta(root, *format))
        seen[format] = {"saved": saved, "erased": erased, "loaded": snapshot(engine)}
        if format[1]:
            seen[format] |= {"went on": (stats, continued), "goes on": (train(engine, seed=2), snapshot(engine))}
    return seen


def read_and_save_again(rank: int, source: str, target: str) -> dict[Any, dict[str, torch.Tensor]]:
    """What an engine with other weights holds after loading each of the formats."""
    engine = start_engine("run.seed=7")
    seen = {}
    for format in FORMATS:
        erase(engine)
        engine.load(meta(source, *format))
        engine.save(meta(target, *format))
        seen[format] = snapshot(engine)
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("of 1", "of 1 again by 2", "of 2", "of 2 again by 1"):
        (root / name).mkdir()
    return root


@pytest.fixture(scope="module")
def by_one(root: Path) -> list[dict[Any, Any]]:
    return run_ranks(round_trips, 1, str(root / "of 1"))


@pytest.fixture(scope="module")
def by_two(root: Path) -> list[dict[Any, Any]]:
    return run_ranks(round_trips, 2, str(root / "of 2"))


@pytest.fixture(scope="module")
def of_two_read_by_one(root: Path, by_two: Any) -> list[dict[Any, Any]]:
    return run_ranks(read_and_save_again, 1, str(root / "of 2"), str(root / "of 2 again by 1"))


@pytest.fixture(scope="module")
def of_one_read_by_two(root: Path, by_one: Any) -> list[dict[Any, Any]]:
    return run_ranks(read_and_save_again, 2, str(root / "of 1"), str(root / "of 1 again by 2"))


def assert_came_back(seen: dict[Any, Any], format: tuple[str, bool]) -> None:
    saved, erased, loaded = (seen[format][when] for when in ("saved", "erased", "loaded"))
    assert len(differing(erased, saved)) == len(saved), "nothing was erased, so this test shows nothing"
    assert differing(loaded, saved, only="model.") == []
    assert differing(loaded, saved if format[1] else erased, only="optim.") == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("ranks", ["by_one", "by_two"])
def test_what_was_saved_comes_back_bit_for_bit(
    ranks: str, format: tuple[str, bool], request: pytest.FixtureRequest
) -> None:
    for seen in request.getfixturevalue(ranks):
        assert_came_back(seen, format)


@pytest.mark.parametrize("format", [("dcp", True), ("hf", True)])
def test_training_goes_on_as_if_nothing_had_happened(by_two: list[dict[Any, Any]], format: tuple[str, bool]) -> None:
    for seen in by_two:
        (stats, parameters), (stats_again, parameters_again) = seen[format]["went on"], seen[format]["goes on"]
        assert stats_again == stats
        assert differing(parameters_again, parameters) == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("source", "reader"), [("by_two", "of_two_read_by_one"), ("by_one", "of_one_read_by_two")])
def test_another_world_size_reads_the_same_state(
    source: str, reader: str, format: tuple[str, bool], request: pytest.FixtureRequest
) -> None:
    saved = request.getfixturevalue(source)[0]["saved"]
    for seen in request.getfixturevalue(reader):
        assert differing(seen[format], saved, only="model.") == []
        if format[1]:
            assert differing(seen[format], saved, only="optim.") == []


def test_the_digest_does_not_depend_on_who_wrote(root: Path, of_two_read_by_one: Any, of_one_read_by_two: Any) -> None:
    assert digests(str(root / "of 2 again by 1")) == digests(str(root / "of 2"))
    assert digests(str(root / "of 1 again by 2")) == digests(str(root / "of 1"))
    # One and two ranks round differently, so these are two states: a digest that saw no difference would be no digest.
    assert not set(digests(str(root / "of 1"))) & set(digests(str(root / "of 2")))


def test_a_checkpoint_holds_tensors_and_json_and_no_pickled_objects(root: Path, by_two: Any) -> None:
    directory = root / "of 2" / "dcp-optim"
    shards = {"shard-00000.distcp", "shard-00001.distcp"}
    sums = {"shard-00000.sums", "shard-00001.sums"}
    described = {".metadata", "layout.json", "manifest.json", "state.json"}
    assert {path.name for path in directory.iterdir()} == shards | sums | described
    metadata = pickle.loads((directory / ".metadata").read_bytes())  # noqa: S301  (written a moment ago)
    assert {type(entry) for entry in metadata.state_dict_metadata.values()} == {TensorStorageMetadata}
    assert {info.relative_path for info in metadata.storage_data.values()} == shards
    for info in metadata.storage_data.values():
        with (directory / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            chunk = io.BytesIO(file.read(info.length))
        assert isinstance(torch.load(chunk, weights_only=True), torch.Tensor)


def test_the_manifest_says_who_wrote_and_sums_every_file(root: Path, by_two: Any) -> None:
    directory = root / "of 2" / "dcp-optim"
    manifest = read_manifest(LocalStorage(directory))
    assert manifest.info == {"world_size": 2, "mesh": {"shard": 2}, "accumulate": "unsharded", "loss": "logits"}
    assert set(manifest.files) | {"manifest.json"} == {path.name for path in directory.iterdir()}
    assert checkpoints.check(LocalStorage(directory)) == manifest.total_bytes


def test_stock_dcp_reads_it(root: Path, by_two: list[dict[Any, Any]]) -> None:
    saved = by_two[0]["saved"]
    state = {f"engine.{name}": torch.full_like(tensor, torch.nan) for name, tensor in saved.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(root / "of 2" / "dcp-optim"), no_dist=True)
    assert differing(state, {f"engine.{name}": tensor for name, tensor in saved.items()}) == []


def test_the_hf_directory_holds_what_transformers_needs_and_no_parts(root: Path, by_two: Any) -> None:
    names = {path.name for path in (root / "of 2" / "hf").iterdir()}
    assert {"config.json"} < names
    assert any(name.endswith(".safetensors") for name in names)
    assert "sharded" not in names


def save_and_load_after_evaluation(rank: int, root: str) -> dict[str, list[str]]:
    """An evaluation leaves parameters gathered when reshard_after_forward is off; state is what it was all the same."""
    engine = start_engine("engine.reshard_after_forward=false")
    train(engine, seed=0)
    saved = snapshot(engine)
    for format in (("dcp", True), ("dcp", False)):
        evaluate(engine, seed=1)
        engine.save(meta(root, *format))
    lost = {}
    for format in (("dcp", True), ("dcp", False)):
        erase(engine)
        evaluate(engine, seed=1)
        engine.load(meta(root, *format))
        lost[format[0] + str(format[1])] = differing(snapshot(engine), saved, only="" if format[1] else "model.")
    return lost


def test_state_is_saved_and_loaded_right_after_an_evaluation(tmp_path: Path) -> None:
    for lost in run_ranks(save_and_load_after_evaluation, 2, str(tmp_path)):
        assert lost == {"dcpTrue": [], "dcpFalse": []}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_saves_and_loads(tmp_path: Path) -> None:
    (seen,) = run_ranks(round_trips, 1, str(tmp_path), gpu=True)
    for format in FORMATS:
        assert_came_back(seen, format)
        if format[1]:
            (stats, after), (stats_again, after_again) = seen[format]["went on"], seen[format]["goes on"]
            # Kernels that add up in any order are allowed on a GPU.
            assert stats_again["loss"] == pytest.approx(stats["loss"], rel=1e-4)
            assert stats_again["lr"] == stats["lr"]
            for name in after:
                torch.testing.assert_close(after_again[name], after[name], rtol=1e-3, atol=1e-4)
