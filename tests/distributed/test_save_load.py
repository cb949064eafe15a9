"""Saving and loading through the engine: nothing lost, at any world size, and failures that every rank hears of."""

from __future__ import annotations

import glob
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from areal_ray import ckpt
from areal_ray.checkpoint import CheckpointDamaged, read_manifest
from areal_ray.engine import FSDPEngine, SaveLoadMeta
from areal_ray.storage import LocalStorage
from tests.distributed.ranks import run_ranks
from tests.distributed.small import (
    FINE,
    attempt,
    differing,
    disk_full,
    erase,
    evaluate,
    global_batch,
    local_batch,
    same_bits,
    snapshot,
    start_engine,
    train,
)

pytestmark = pytest.mark.distributed

UNTIED = "model.config.tie_word_embeddings=false"
FORMATS = [("dcp", True), ("dcp", False), ("hf", True), ("hf", False)]


def meta(root: str, weight_format: Any, with_optim: bool) -> SaveLoadMeta:
    return SaveLoadMeta(f"{root}/{weight_format}{'-optim' if with_optim else ''}", weight_format, with_optim)


def digests(root: str) -> list[str]:
    """Of the DCP part of each format that there is: the optimizer alone in the case of `hf`."""
    parts = (f"{root}/dcp-optim", f"{root}/dcp", f"{root}/hf-optim/optim")
    return [ckpt.digest(LocalStorage(part)) for part in parts]


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
    assert {path.name for path in directory.iterdir()} == shards | {".metadata", "manifest.json", "state.json"}
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
    assert manifest.info == {"world_size": 2, "mesh": {"shard": 2}}
    assert set(manifest.files) | {"manifest.json"} == {path.name for path in directory.iterdir()}
    assert ckpt.check(LocalStorage(directory)) == manifest.total_bytes


def test_stock_dcp_reads_it(root: Path, by_two: list[dict[Any, Any]]) -> None:
    saved = by_two[0]["saved"]
    state = {f"engine.{name}": torch.full_like(tensor, torch.nan) for name, tensor in saved.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(root / "of 2" / "dcp-optim"), no_dist=True)
    assert differing(state, {f"engine.{name}": tensor for name, tensor in saved.items()}) == []


def hf_directory(rank: int, root: str) -> list[dict[str, Any]]:
    """Logits of the engine and of what transformers makes of its `hf` directory, tied and untied, one rank."""
    outcomes = []
    for name, overrides in {"tied": [], "untied": [UNTIED]}.items():
        engine = start_engine("train.micro_batch_size=8", *overrides)
        train(engine, seed=0)
        engine.save(SaveLoadMeta(f"{root}/{name}", "hf", with_optim=False))
        model = AutoModelForCausalLM.from_pretrained(f"{root}/{name}").eval()
        with torch.no_grad():
            theirs = model(**global_batch(1)).logits
        ours = engine.forward(local_batch(1))
        dtypes = {p.dtype for p in model.parameters()}
        outcomes.append({"ours": ours, "theirs": theirs, "dtypes": dtypes, "tied": _is_tied(model)})
    return outcomes


def _is_tied(model: Any) -> bool:
    return bool(model.lm_head.weight is model.model.embed_tokens.weight)


def test_transformers_opens_the_hf_directory_and_computes_the_same(tmp_path: Path) -> None:
    (outcomes,) = run_ranks(hf_directory, 1, str(tmp_path))
    for outcome in outcomes:
        assert outcome["dtypes"] == {torch.float32}
        assert same_bits(outcome["ours"], outcome["theirs"])
    assert [outcome["tied"] for outcome in outcomes] == [True, False]


def test_the_hf_directory_holds_what_transformers_needs_and_no_parts(root: Path, by_two: Any) -> None:
    names = {path.name for path in (root / "of 2" / "hf").iterdir()}
    assert {"config.json"} < names
    assert any(name.endswith(".safetensors") for name in names)
    assert "sharded" not in names


# ---- what goes wrong is heard by every rank ----


def flip_a_bit(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a bit early in the shard of rank 0": ("shard-00000.distcp", lambda path: flip_a_bit(path, 0.05)),
    "a bit in the middle of the shard of rank 1": ("shard-00001.distcp", lambda path: flip_a_bit(path, 0.5)),
    "the last bits of the shard of rank 1": ("shard-00001.distcp", lambda path: flip_a_bit(path, 1)),
    "a shard cut short": ("shard-00001.distcp", lambda path: os.truncate(path, path.stat().st_size - 100)),
    "no shard of rank 1": ("shard-00001.distcp", Path.unlink),
    "a bit in the metadata": (".metadata", lambda path: flip_a_bit(path, 0.5)),
    "a bit in the values": ("state.json", lambda path: flip_a_bit(path, 0.5)),
    "a bit in the manifest": ("manifest.json", lambda path: flip_a_bit(path, 0.5)),
    "no manifest": ("manifest.json", Path.unlink),
}


def fail(rank: int, root: str) -> dict[str, Any]:
    """Saves that one rank alone cannot do, loads of what is damaged or does not fit, and what works in between."""
    engine = start_engine()
    train(engine, seed=0)
    seen: dict[str, Any] = {}
    for victim in (0, 1):
        with disk_full(rank == victim):
            seen[f"full on {victim}"] = attempt(lambda v=victim: engine.save(SaveLoadMeta(f"{root}/full-{v}")))
    seen["fine"] = attempt(lambda: engine.save(SaveLoadMeta(f"{root}/fine")))
    seen["exists"] = attempt(lambda: engine.save(SaveLoadMeta(f"{root}/fine")))
    seen["no parent"] = attempt(lambda: engine.save(SaveLoadMeta(f"{root}/missing/parent")))
    seen["weights"] = attempt(lambda: engine.save(SaveLoadMeta(f"{root}/weights", with_optim=False)))
    saved = snapshot(engine)
    for number, (what, (name, damage)) in enumerate(DAMAGE.items()):
        path = Path(root) / f"damaged-{number}"
        if rank == 0:
            shutil.copytree(f"{root}/fine", path)
            damage(path / name)
        dist.barrier()
        seen[what] = attempt(lambda path=path: engine.load(SaveLoadMeta(str(path))))
    seen["too little"] = attempt(lambda: engine.load(SaveLoadMeta(f"{root}/weights")))
    seen["too much"] = attempt(lambda: engine.load(SaveLoadMeta(f"{root}/fine", with_optim=False)))
    narrow = start_engine("model.config.hidden_size=32")
    before = snapshot(narrow)
    seen["other model"] = attempt(lambda: narrow.load(SaveLoadMeta(f"{root}/fine")))
    seen["changed by other model"] = differing(snapshot(narrow), before)
    erase(engine)
    seen["fine again"] = attempt(lambda: engine.load(SaveLoadMeta(f"{root}/fine")))
    seen["lost"] = differing(snapshot(engine), saved)
    return seen


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("failed")
    return path, run_ranks(fail, 2, str(path))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_cannot_write_is_heard_by_all(failed: tuple[Path, list[dict[str, Any]]], victim: int) -> None:
    path, outcomes = failed
    for seen in outcomes:
        outcome = seen[f"full on {victim}"]
        assert (outcome.error, outcome.ranks) == ("RankError", (victim,))
        assert "OSError: [Errno 27] File too large" in outcome.text
    with pytest.raises(CheckpointDamaged, match="never finished"):
        read_manifest(LocalStorage(path / f"full-{victim}"))


def test_nothing_is_saved_over_anything(failed: tuple[Path, list[dict[str, Any]]]) -> None:
    path, outcomes = failed
    for seen in outcomes:
        for what, error in (("exists", "FileExistsError"), ("no parent", "FileNotFoundError")):
            assert (seen[what].error, seen[what].ranks) == ("RankError", (0,))
            assert error in seen[what].text
    assert ckpt.check(LocalStorage(path / "fine")) > 0


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_and_heard_by_all(failed: tuple[Path, list[dict[str, Any]]], what: str) -> None:
    name, _ = DAMAGE[what]
    for seen in failed[1]:
        assert seen[what].error == "RankError"
        assert f"CheckpointDamaged: {name}: " in seen[what].text
    assert len({seen[what] for seen in failed[1]}) == 1, "all ranks hear the same"


def test_the_rank_that_reads_the_damage_is_named(failed: tuple[Path, list[dict[str, Any]]]) -> None:
    heard = failed[1][0]["a bit in the middle of the shard of rank 1"]
    assert heard.ranks == (1,)
    assert "checksum" in heard.text


def test_a_checkpoint_that_does_not_fit_is_refused_by_all(failed: tuple[Path, list[dict[str, Any]]]) -> None:
    why = {
        "too little": "missing in it: engine.optim.",
        "too much": "unknown here: engine.optim.",
        "other model": "engine.model.model.embed_tokens.weight is (264, 64) in it and (264, 32) here",
    }
    for seen in failed[1]:
        for what, text in why.items():
            assert seen[what].error == "ValueError"
            assert text in seen[what].text
        assert seen["changed by other model"] == []


def test_after_all_these_failures_the_next_save_and_load_work(failed: tuple[Path, list[dict[str, Any]]]) -> None:
    for seen in failed[1]:
        assert [seen[what] for what in ("fine", "weights", "fine again")] == [FINE] * 3
        assert seen["lost"] == []


def fail_with_hf(rank: int, root: str) -> dict[str, Any]:
    """The same for the `hf` format, which is written in place."""
    engine = start_engine()
    seen: dict[str, Any] = {"lost to leftovers": _save_over_leftovers(rank, engine, Path(root, "leftovers"))}
    engine.save(SaveLoadMeta(f"{root}/fine", "hf", with_optim=False))
    seen["on return"] = sorted(path.name for path in Path(root, "fine").iterdir())
    for victim in (0, 1):
        meta = SaveLoadMeta(f"{root}/full-{victim}", "hf", with_optim=False)
        with disk_full(rank == victim):
            seen[f"full on {victim}"] = attempt(lambda meta=meta: engine.save(meta))
    if rank == 0:
        Path(root, "no config", "config.json").mkdir(parents=True)
        written = next(Path(root, "fine").glob("*.safetensors"))
        Path(root, "cut").mkdir()
        Path(root, "cut", written.name).write_bytes(written.read_bytes()[:-1000])
    dist.barrier()
    seen["no config"] = attempt(lambda: engine.save(SaveLoadMeta(f"{root}/no config", "hf", with_optim=False)))
    seen["cut"] = attempt(lambda: engine.load(SaveLoadMeta(f"{root}/cut", "hf", with_optim=False)))
    fine = SaveLoadMeta(f"{root}/fine", "hf", with_optim=False)
    seen["absent"] = attempt(lambda: engine.load(SaveLoadMeta(f"{root}/absent", "hf", with_optim=False)))
    seen["too little"] = attempt(lambda: start_engine(UNTIED).load(fine))
    seen["other model"] = attempt(lambda: start_engine("model.config.hidden_size=32").load(fine))
    return seen


def _save_over_leftovers(rank: int, engine: FSDPEngine, root: Path) -> list[str]:
    """Save where an interrupted save of more ranks left a part; names that do not come back."""
    if rank == 0:
        (root / "sharded").mkdir(parents=True)
        # As DCP's own writer makes them: of the third rank, the second half of a tensor, with other values.
        part = root / "sharded" / "shard-00003-model-00001-of-00001.safetensors"
        offsets = json.dumps({"model.norm.weight": {"saved_offsets": [32]}})
        values = {"model.norm.weight": torch.full((32,), 99.0)}
        safetensors.torch.save_file(values, part, metadata={"DCP_SHARDING_INFO": offsets})
    dist.barrier()
    # DCP takes files in the order of the directory, which can be any; from here on what was left over comes last.
    unordered = glob.glob
    glob.glob = lambda *args, **kwargs: sorted(unordered(*args, **kwargs))
    saved = snapshot(engine)
    engine.save(SaveLoadMeta(str(root), "hf", with_optim=False))
    erase(engine)
    engine.load(SaveLoadMeta(str(root), "hf", with_optim=False))
    return differing(snapshot(engine), saved, only="model.")


@pytest.fixture(scope="module")
def failed_hf(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(fail_with_hf, 2, str(tmp_path_factory.mktemp("failed hf")))


@pytest.mark.parametrize("victim", [0, 1])
def test_hf_a_rank_that_cannot_write_is_heard_by_all(failed_hf: list[dict[str, Any]], victim: int) -> None:
    for seen in failed_hf:
        assert seen[f"full on {victim}"].error == "RankError"
        assert "File too large" in seen[f"full on {victim}"].text


def test_hf_a_config_that_cannot_be_written_is_heard_by_all(failed_hf: list[dict[str, Any]]) -> None:
    for seen in failed_hf:
        assert seen["no config"].error == "RankError"
        assert "config.json" in seen["no config"].text


def test_hf_the_directory_is_complete_when_save_returns_on_any_rank(failed_hf: list[dict[str, Any]]) -> None:
    for seen in failed_hf:
        assert "config.json" in seen["on return"]
        assert "sharded" not in seen["on return"]


def test_hf_what_an_interrupted_save_left_does_not_get_into_the_next(failed_hf: list[dict[str, Any]]) -> None:
    assert [seen["lost to leftovers"] for seen in failed_hf] == [[], []]


@pytest.mark.parametrize("what", ["cut", "absent"])
def test_hf_damage_is_heard_by_all(failed_hf: list[dict[str, Any]], what: str) -> None:
    for seen in failed_hf:
        assert seen[what].error == "RankError"


def test_hf_weights_that_do_not_fit_are_refused_by_all(failed_hf: list[dict[str, Any]]) -> None:
    for seen in failed_hf:
        for what, name in (("too little", "lm_head.weight"), ("other model", "model.embed_tokens.weight")):
            assert seen[what].error == "ValueError"
            assert name in seen[what].text


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
