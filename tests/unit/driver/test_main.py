"""The driver's checks before anything is started, and what it writes down."""

import json
import re
import shutil
import subprocess
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray.train import WorkerGroupError

from areal_ray.checkpoint import Catalog, save
from areal_ray.cli.main import main as run_cli
from areal_ray.config import ConfigError, load
from areal_ray.data.splits import open_sets, open_splits
from areal_ray.data.tokenizers import ByteTokenizer
from areal_ray.distributed import Ranks
from areal_ray.driver import main as driver_main
from areal_ray.driver import preflight
from areal_ray.driver.data import noted
from areal_ray.driver.first_weights import read_at_each_start, with_first_weights
from areal_ray.driver.main import _record, prepare
from areal_ray.engine.objectives import build_objective
from areal_ray.engine.state import DCPState
from areal_ray.models import architecture, build_model, init_weights, materialise
from areal_ray.storage import LocalStorage, s3
from areal_ray.storage.s3_client import S3Client
from areal_ray.worker.provenance import provenance
from tests.unit.checkpoint.boxes import Box, save_box, weights
from tests.unit.data.tokenizer_files import save_tokenizer
from tests.unit.driver.test_exports import Made

pytestmark = pytest.mark.unit

SEVEN = ("train.steps=7", "optim.warmup_steps=2")
TINY = str(Path(__file__).parents[3] / "conf" / "experiments" / "tiny.yaml")


@pytest.fixture
def config(tmp_path):
    """Of an experiment on a corpus of two files; more overrides as arguments."""
    (tmp_path / "corpus").mkdir()
    for name in ("one", "two"):
        (tmp_path / "corpus" / name).write_bytes(b"a" * 1000)

    def config(*overrides):
        sizes = ["train.seq_len=64", "data=text", f"data.paths=[{tmp_path}/corpus]", f"run.storage_path={tmp_path}"]
        return load(TINY, [*sizes, *overrides])

    return config


def key_of(config):
    with pytest.raises(ConfigError) as caught:
        prepare(config)
    return caught.value.key


def test_a_new_run_is_prepared_without_touching_anything(config, tmp_path):
    run, fixed, _ = prepare(config())
    assert run.storage.location == str(tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()
    assert fixed == config()


def test_a_relative_storage_path_becomes_absolute(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare(config("run.storage_path=runs"))[1].run.storage_path == str(tmp_path / "runs")


def test_what_cannot_be_is_found_before_anything_starts(config, monkeypatch):
    # Else it asks for a bucket that is not there for twenty seconds.
    monkeypatch.setattr(s3, "S3Client", lambda options, _: S3Client(options, attempts=1))
    assert key_of(config("run.storage_path=s3://bucket/runs")) == "run.storage_path"
    assert key_of(config("model.config.vocab_size=100")) == "model.config.vocab_size"
    assert key_of(config("train.seq_len=1024")) == "data.paths"
    assert key_of(config("data.tokenizer=/nothing")) == "data.tokenizer"
    assert key_of(config("engine.mesh.tensor=4", "cluster.num_workers=4")) == "engine.mesh.tensor"


def test_a_tokenizer_with_ids_that_the_model_has_no_row_for_is_found_before_anything_starts(config, tmp_path):
    special = {"<s>": 256, "</s>": 257, "<tool>": 400}  # 259 tokens
    tokenizer = save_tokenizer(tmp_path / "tokenizer", special=special)
    with pytest.raises(ConfigError, match="264 rows of embeddings, but the tokenizer has ids up to 400") as caught:
        prepare(config(f"data.tokenizer={tokenizer}"))
    assert caught.value.key == "model.config.vocab_size"


def test_a_mixture_is_prepared_by_its_sources_and_what_is_cut_is_said(config, tmp_path, capsys):
    line = '{"prompt": "a", "completion": "' + "b" * 90 + '"}\n'
    (tmp_path / "chats.jsonl").write_text(line * 40)
    (tmp_path / "notes").mkdir()
    for i in range(32):
        (tmp_path / "notes" / f"{i}").write_text(f"{i} " * 100)
    mixture = [
        f"{{name: notes, source: text, paths: [{tmp_path}/notes], held_out: 0.5, weight: 3}}",
        f"{{name: chats, source: jsonl, format: completion, paths: [{tmp_path}/chats.jsonl], held_out: 0, weight: 1}}",
    ]
    own = ["data.source=stdlib", "data.paths=[]", "data.packing=best_fit", "data.truncation=right"]
    _, fixed, sources = prepare(config(*own, f"data.mixture=[{', '.join(mixture)}]", "train.global_batch_size=2"))
    assert list(sources) == ["notes", "chats"]
    train, held_out = open_splits(fixed.data, sources, 64)
    notes = len(train) - 40  # a row each, without its end
    assert notes + len(held_out) == 32
    order = train.order(0)
    assert sum(order[n] >= notes for n in range(400)) == 100
    assert "40 of 40 documents are longer than train.seq_len=64 tokens: without their end" in capsys.readouterr().out


def test_evaluation_sets_are_prepared_whole_beside_what_is_trained_on(config, tmp_path):
    line = '{"prompt": "a", "completion": "' + "b" * 90 + '"}\n'
    (tmp_path / "chats.jsonl").write_text(line * 40)
    a_set = f"{{source: jsonl, format: completion, paths: [{tmp_path}/chats.jsonl]}}"
    small = ["train.global_batch_size=2", "data.packing=none", "data.truncation=right", "data.held_out=0"]
    checked = config(*small, f"eval.sets={{chats: {a_set}}}")
    run, fixed, sources = prepare(checked)
    assert list(sources) == ["", "eval/chats"]
    rows = open_sets(fixed.evaluation_sets, sources, ByteTokenizer(), 64, 2)["chats"]
    assert len(rows) == 40  # nothing of it is held out
    assert (rows[np.asarray([0])]["labels"][0, :1] == ord("b")).all()
    notes = noted(fixed, sources)
    assert notes["eval/chats"]["settings"]["format"] == "completion"
    (tmp_path / "tiny").mkdir()
    run.write_data(notes)
    assert run.data() == notes
    # A single corpus as data.prepared_path is the one to train on; the set lies where corpora lie.
    single = replace(checked, data=replace(checked.data, prepared_path=sources[""].location))
    again = prepare(single)[2]
    assert {name: source.location for name, source in again.items()} == {
        name: source.location for name, source in sources.items()
    }
    with pytest.raises(ConfigError, match=r"40 documents give 40 sequences .* a global batch takes 41") as caught:
        open_sets(fixed.evaluation_sets, sources, ByteTokenizer(), 64, 41)
    assert caught.value.key == "eval.sets.chats.paths"
    assert key_of(config("eval.sets={a: {source: text, paths: [/nowhere]}}")) == "eval.sets.a.paths"


@pytest.mark.parametrize(
    ("overrides", "key", "part"),
    [
        (["optim.name=torch.optim:SGD", "optim.args={momentm: 0.9}"], "optim.args", "unexpected keyword argument"),
        (["trackers=[{name: 'json:JSONEncoder', args: {a: 1}}]"], "trackers[0].args", "unexpected keyword argument"),
        (["objective.name=json:JSONEncoder"], "objective.name", "no areal_ray.engine.Objective"),
        (["objective.args={z_loss: -1}"], "objective.args.z_loss", "0 or more"),
        (["objective={name: distillation, args: {teacher: /no}}"], "objective.args", "teacher: no Hugging Face model"),
        (["optim.groups=[{pattern: nowhere}]"], "optim.groups[0].pattern", "found in no parameter's name"),
        (["optim.name=muon", "optim.args={rank: 3}"], "optim.args", "unexpected keyword argument 'rank'"),
    ],
)
def test_parts_of_one_s_own_are_found_to_be_wrong_before_anything_starts(config, overrides, key, part):
    with pytest.raises(ConfigError, match=part) as caught:
        prepare(config(*overrides))
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("overrides", "key", "part"),
    [
        (
            ["model.config.model_type=gpt2", "model.config.max_position_embeddings=8"],
            "train.seq_len",
            "has 8 positions",
        ),
        (["model.config.model_type=gemma2", "model.attention=sdpa"], "model.attention", "sdpa is not for this model"),
        (["engine.mesh.tensor=2", "model.loss=chunked"], "model.loss", "no rank has the whole output layer"),
        (["model.shard_units=[Nobody]"], "model.shard_units", "no module of class Nobody"),
        (
            ["model.config.model_type=openai-gpt", "engine.activation_checkpointing=2"],
            "engine.activation_checkpointing",
            "does not support activation checkpointing",
        ),
    ],
)
def test_what_a_model_cannot_do_is_found_before_anything_starts(config, overrides, key, part):
    with pytest.raises(ConfigError, match=part) as caught:
        prepare(config(*overrides))
    assert caught.value.key == key


def test_a_model_that_does_it_in_another_way_is_said_to(config, capsys):
    prepare(config("model.config.model_type=gemma2", "model.config.vocab_size=300000", "train.micro_batch_size=8"))
    said = capsys.readouterr().out
    assert "Gemma2ForCausalLM has no scaled_dot_product_attention: its attention is eager" in said
    assert "all logits" not in said  # of so few tokens
    prepare(config())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("saved", "overrides", "key"),
    [
        ({}, [], None),
        ({"name": "adamw", "groups": []}, [], None),
        ({}, ["optim.name=torch.optim:SGD"], "optim.name"),
        ({"groups": [{"pattern": "norm", "freeze": True}]}, [], "optim.groups"),
        ({"groups": [{"pattern": "norm", "freeze": False}]}, [], None),
        ({}, ["optim.groups=[{pattern: norm, freeze: true}]"], "optim.groups"),
        ({"name": "muon"}, ["optim.name=muon", "optim.args={momentum: 0.5}"], None),
        ({"name": "muon"}, ["optim.name=muon", "optim.args={adamw: [down]}"], "optim.args"),
        ({"name": "sgd", "args": {"momentum": 0}}, ["optim.name=sgd"], "optim.args"),
        ({"ema": {"decay": 0.9}}, ["optim.ema={}"], None),
        ({}, ["optim.ema={}"], None),
        ({"ema": {"decay": 0.9}}, [], "optim.ema"),
    ],
)
def test_a_run_goes_on_with_the_optimizer_that_it_began_with(config, saved, overrides, key):
    if key is None:
        preflight._check_optimizer_continues(saved, config(*overrides))
        return
    with pytest.raises(ConfigError, match="this run's checkpoints") as caught:
        preflight._check_optimizer_continues(saved, config(*overrides))
    assert caught.value.key == key


def test_a_run_goes_on_tied_as_it_began(config, tmp_path):
    _, fixed, _ = prepare(config())
    info = {"step": 1, "attempt": 1, **provenance(fixed), "data": {}}
    run = LocalStorage(tmp_path / "tiny")
    run.ensure()
    save(run.sub(Catalog.name(1, 1)), {"box": Box(**weights())}, info, Ranks())
    prepare(config("model.tie=true", "run.allow_changes=[data]"))  # as the model's config has it
    with pytest.raises(ConfigError, match=r"of another model: model\.tie was None and is False") as caught:
        prepare(config("model.tie=false", "run.allow_changes=[data]"))
    assert caught.value.key == "model.config"
    factory = replace(fixed.model, path="/gone", config={}, factory="mine:make")
    assert not preflight._other_architecture(None, factory)


LORA = {"name": "lora", "args": {"r": 2, "target_modules": ["q_proj"]}}


@pytest.mark.parametrize(
    ("saved", "now", "part"),
    [
        (None, LORA, "of no adapter, and now it is lora"),
        (LORA, None, "and now it is none"),
        (LORA, {**LORA, "args": {"r": 4, "target_modules": ["q_proj"]}}, "now it is lora with {'r': 4"),
        (LORA, LORA, None),
        (None, None, None),
    ],
)
def test_a_run_goes_on_with_the_adapter_that_it_began_with(config, saved, now, part):
    checked = config(f"adapter={json.dumps(now)}")
    saved = saved and {**saved, "base": {"fingerprint": "0"}}
    if part is None:
        preflight._check_adapter_continues(saved, checked)
        return
    with pytest.raises(ConfigError) as caught:
        preflight._check_adapter_continues(saved, checked)
    assert caught.value.key == "adapter"
    assert part in caught.value.message


@pytest.mark.parametrize(
    ("overrides", "key", "part"),
    [
        (["adapter.name=qlora"], "adapter.name", "knows lora, or package.module:Class"),
        (["adapter.name=a.b"], "adapter.name", "knows lora"),
        (["adapter.name=collections:OrderedDict"], "adapter.name", "returned OrderedDict, no Adapter"),
        (["adapter.name=lora", "engine.mesh.tensor=2"], "engine.mesh.tensor", "it must be 1"),
        (["adapter={name: lora, args: {target_modules: [nope]}}"], "adapter.args", "not for Qwen3ForCausalLM"),
    ],
)
def test_an_adapter_that_cannot_be_is_found_before_anything_starts(config, overrides, key, part):
    pytest.importorskip("peft", reason="adapters by LoRA need the extra areal_ray[lora]")
    with pytest.raises(ConfigError, match=re.escape(part)) as caught:
        prepare(config(*overrides))
    assert caught.value.key == key


def test_what_an_adapter_trains_is_said_before_anything_starts(config, capsys):
    pytest.importorskip("peft", reason="adapters by LoRA need the extra areal_ray[lora]")
    prepare(config(f"adapter={json.dumps(LORA)}"))
    assert re.search(r"adapter lora: [\d,]+ parameters, [\d,]+ of them trained \(0\.\d+%\)", capsys.readouterr().out)


def test_epochs_are_counted_in_steps_when_the_data_are_known(config, tmp_path, capsys):
    given = config("train.epochs=12", "optim.warmup_epochs=1")
    _, fixed, sources = prepare(given)
    rows = len(open_splits(fixed.data, sources, 64)[0])
    assert (fixed.train.steps, fixed.train.epochs, fixed.optim.warmup_steps) == (
        -(-12 * rows // 8),
        None,
        -(-rows // 8),
    )
    assert f"12 epochs: {fixed.train.steps} steps of 8 samples" in capsys.readouterr().out
    assert prepare(given)[1] == fixed
    saved = {"config": {"train": {"global_batch_size": 4}}}
    preflight._check_same_batch(saved, config())
    with pytest.raises(ConfigError, match=r"was 4 when .*: give its length in train.steps, not as 12 epochs"):
        preflight._check_same_batch(saved, given)


def test_it_is_said_which_matrices_muon_takes(config, capsys):
    prepare(config("optim.name=muon"))
    assert "muon: 28 matrices; AdamW takes model.embed_tokens.weight and 17 vectors" in capsys.readouterr().out


def test_fresh_refuses_a_used_directory(config, tmp_path):
    prepare(config("run.recover=fresh"))
    (tmp_path / "tiny").mkdir()
    prepare(config("run.recover=fresh"))
    (tmp_path / "tiny" / "events.jsonl").write_text("")
    assert key_of(config("run.recover=fresh")) == "run.recover"


def test_resume_insists_on_a_checkpoint(config, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "step-00000001.a1").mkdir()
    assert key_of(config("run.recover=resume")) == "run.recover"
    save_box(tmp_path / "tiny", step=2)
    prepare(config("run.recover=resume"))


@pytest.fixture
def _no_git(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="abc123\n"))


@pytest.mark.usefixtures("_no_git")
def test_the_record_tells_revision_overrides_and_all_values(config, tmp_path):
    text = _record(config(), ["train.steps=300"])
    assert text.startswith("# git revision: abc123\n# override: train.steps=300\nrun:\n")
    (tmp_path / "recorded.yaml").write_text(text)
    assert load(str(tmp_path / "recorded.yaml")) == config()


@pytest.mark.usefixtures("_no_git")
@pytest.mark.parametrize(
    "override",
    [
        "model.args.api_key=hunter2",
        "model.args={hf_token: hunter2}",
        "model.args.credentials={value: hunter2}",
        "model.args.credentials.value=hunter2",
    ],
)
def test_the_record_does_not_tell_a_secret_that_was_typed(config, override):
    text = _record(config(), [override])
    assert "hunter2" not in text
    assert "# override: model.args" in text


@pytest.mark.parametrize("slow", ["a name of Ray Train is missing", None])
def test_a_connection_that_was_opened_early_is_opened_anew_for_slow_restarts(config, monkeypatch, slow):
    class Connecting(Exception):
        pass

    def cluster(config, fork_server, fast):
        raise Connecting(fast, list(closed))

    closed, early = [], ExitStack()
    early.callback(closed.append, "closed")
    monkeypatch.setattr(driver_main, "slow_because", lambda *_, **__: slow)
    monkeypatch.setattr(driver_main, "cluster", cluster)
    with pytest.raises(Connecting) as caught:
        driver_main.train(config(), early=early)
    assert caught.value.args == ((False, ["closed"]) if slow else (True, []))


told = []


def tell(result, directory):
    told.append((directory, result))


@pytest.fixture
def drive(config, monkeypatch):
    """Runs the driver around workers whose outcome is at hand; the run's result goes with the status."""

    def drive(outcome, *overrides):
        shown = SimpleNamespace(wait_for_end=lambda **_: None)
        for name in ("cluster", "display", "hold_lease", "watching"):
            monkeypatch.setattr(driver_main, name, lambda *_, **__: nullcontext(shown))
        monkeypatch.setattr(driver_main, "slow_because", lambda *_, **__: None)
        monkeypatch.setattr(driver_main, "requests_to", lambda *_: SimpleNamespace(close=lambda: None))
        monkeypatch.setattr(driver_main, "choose_fit", lambda *_: None)
        monkeypatch.setattr(driver_main, "supervise", lambda *_, **__: outcome())
        context = SimpleNamespace(gcs_address="127.0.0.1:1")
        monkeypatch.setattr(driver_main.ray, "get_runtime_context", lambda: context)
        told.clear()
        status = driver_main.train(config(*SEVEN, "on_end=tests.unit.driver.test_main:tell", *overrides))
        return status, prepare(config(*SEVEN))[0].result()

    return drive


def ended(storage_path, checkpoint):
    def outcome():
        assert (storage_path / "tiny" / "submission").is_file()  # for the workers to see
        if checkpoint:
            save_box(storage_path / "tiny", step=7)
        return {"reason": None, "step": 7, "loss": 1.0, "world_size": 2}

    return outcome


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_run_without_a_checkpoint_has_not_ended_well(drive, tmp_path, capsys, checkpoint):
    status, result = drive(ended(tmp_path, checkpoint))
    assert (status, result["status"]) == ((0, "finished") if checkpoint else (1, "failed"))
    assert told == [(str(tmp_path / "tiny"), result)]
    assert ("there is no checkpoint in" in capsys.readouterr().out) != checkpoint


def test_a_run_that_has_failed_has_a_panel_and_is_told_to_on_end(drive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(driver_main.ray_internals, "log_directory", lambda: "/tmp/ray/logs")

    def fail():
        raise WorkerGroupError("", {1: OSError(28, "No space left on device")})

    status, result = drive(fail)
    assert (status, result["status"]) == (1, "failed")
    assert told == [(str(tmp_path / "tiny"), result)]
    panel = capsys.readouterr().err
    assert "OSError: [Errno 28] No space left on device" in panel
    assert "is full, or its quota used up" in panel


def test_a_jump_of_the_learning_rate_is_said_before_the_workers_start(drive, config, tmp_path, capsys):
    info = {"step": 5, "attempt": 1, "config": asdict(config(*SEVEN, "optim.lr=1.0"))}
    (tmp_path / "tiny").mkdir()
    save(LocalStorage(tmp_path / "tiny").sub(Catalog.name(5, 1)), {"box": Box(**weights())}, info, Ranks())
    drive(ended(tmp_path, True))
    assert "\nlearning rate: it jumps from " in capsys.readouterr().out


def test_a_run_that_stops_early_makes_the_exports_that_are_due_and_not_that_of_its_end(drive, tmp_path, monkeypatch):
    monkeypatch.setattr(driver_main, "Exporter", Made)
    folder = tmp_path / "tiny" / "export"

    def stopped():
        for step in (2, 4, 5):
            save_box(tmp_path / "tiny", step=step)
        return {"reason": None, "step": 5, "loss": 1.0, "world_size": 2}

    for _ in range(2):  # the second time it has come so far already
        status, result = drive(stopped, "train.stop_at=5", "export={every_steps: 2}")
        assert (status, result["status"]) == (0, "stopped")
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]
        shutil.rmtree(folder / "step-00000004")


@pytest.mark.parametrize(("step", "early", "status"), [(7, False, 0), (4, False, 1), (4, True, 0)])
def test_a_head_node_that_is_lost_after_the_last_commit_is_no_failure(
    config, tmp_path, monkeypatch, step, early, status
):
    class Exit(Exception):
        pass

    def leave(code):
        raise Exit(code)

    run, checked, _ = prepare(config(*SEVEN, "eval.early_stopping={patience: 1}"))
    run.storage.ensure()
    if early:
        run.event("stopped_early", step=step, rule=asdict(checked.eval.early_stopping))
    save_box(tmp_path / "tiny", step=step)
    monkeypatch.setattr(driver_main.os, "_exit", leave)
    with pytest.raises(Exit) as caught:
        driver_main._lost_head(checked, run, "10.0.0.1:6379")
    assert caught.value.args == (status,)
    assert run.result()["status"] == ("failed" if status else "finished")


def save_runs(config, tmp_path):
    """Two runs with a checkpoint each, `mine` with bytes and `theirs` with a tokenizer of files."""
    of = config("model.config.hidden_size=32", "model.config.num_hidden_layers=1").model
    model = build_model(of)
    materialise(model, torch.device("cpu"))
    init_weights(model, seed=0)
    for run, tokenizer in (("mine", "bytes"), ("theirs", "org/name")):
        info = {"step": 1, "attempt": 1, "hf_config": architecture(of), "tokenizer": tokenizer}
        directory = LocalStorage(tmp_path / run)
        directory.ensure()
        save(directory.sub(Catalog.name(1, 1)), {"engine": DCPState(model)}, info, Ranks())


def test_the_path_of_a_run_does_wherever_an_experiment_is_given(config, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    save_runs(config, tmp_path)
    told = ["--config", TINY, "data=text", f"data.paths=[{tmp_path}/corpus]", "train.seq_len=64", "model=pretrained"]
    mine = [*told, f"run.storage_path={tmp_path}/new", f"model.path={tmp_path}/mine"]
    for command in (["doctor"], ["train", "--dry-run"]):  # the data are not prepared yet
        assert run_cli([*command, *mine]) == 0
        assert "MB are not prepared yet" in capsys.readouterr().out
    assert run_cli(["prepare", *mine]) == 0
    assert "prepared data: 2 documents" in capsys.readouterr().out
    assert run_cli(["doctor", *mine]) == 0
    assert "tokens: " in capsys.readouterr().out  # these are its data
    assert run_cli(["prepare", *mine, f"model.path={tmp_path}/theirs"]) == 2
    assert "not loaded unasked: say data.tokenizer=org/name" in capsys.readouterr().err


def test_first_weights_and_their_tokenizer_are_settled_before_anything_starts(config, tmp_path, capsys):
    save_runs(config, tmp_path)
    _, fixed, _ = prepare(config("model=pretrained", f"model.path={tmp_path}/mine"))
    assert fixed.model.path == f"{tmp_path}/mine/{Catalog.name(1, 1)}"
    assert (fixed.model.config["hidden_size"], fixed.model.tie, fixed.data.tokenizer) == (32, True, "bytes")
    assert f"first weights: those of {Catalog.name(1, 1)} in {tmp_path}/mine" in capsys.readouterr().out
    theirs = ("model=pretrained", f"model.path={tmp_path}/theirs")
    with pytest.raises(ConfigError, match=r"not loaded unasked: say data\.tokenizer=org/name"):
        prepare(config(*theirs))
    with pytest.raises(ConfigError, match="bytes is not the tokenizer of"):
        prepare(config(*theirs, "data.tokenizer=bytes"))
    prepare(config(*theirs, "data.tokenizer=bytes", "data.allow_other_tokenizer=true"))
    assert key_of(config("model=pretrained", f"model.path={tmp_path}/corpus")) == "model.path"


def test_a_run_that_goes_on_needs_its_first_weights_no_more(config, tmp_path):
    cli = config("model=pretrained", "model.path=/runs/gone")
    saved = {"path": "/runs/gone/step-00000001.a1", "config": {"model_type": "llama"}, "tie": True}
    found = with_first_weights(cli, {"config": {"model": saved}, "tokenizer": "bytes"})
    assert (found.model.path, found.model.config, found.model.tie) == (saved["path"], saved["config"], True)
    assert found.data.tokenizer == "bytes"


@pytest.mark.parametrize("path", ["/runs/gone", "~/gone-run-of-mine", "s3://gone/run"])
def test_a_run_whose_model_is_said_beside_its_first_weights_needs_them_no_more(config, path, monkeypatch):
    def look(self, *_):
        raise AssertionError("the storage was asked")

    monkeypatch.setattr(s3, "S3Storage", look)
    checkpoint = f"{Path(path).expanduser() if path[0] == '~' else path}/step-00000001.a1"
    for given in (path, checkpoint):
        cli = config(f"model.path={given}")  # beside model.config
        saved = {"path": checkpoint, "config": cli.model.config, "tie": None}
        found = with_first_weights(cli, {"config": {"model": saved}, "tokenizer": "bytes"})
        assert found.model == replace(cli.model, path=checkpoint)


@pytest.mark.parametrize(
    ("overrides", "objective", "said"),
    [
        ([], "language_modeling", None),
        (
            ["adapter.name=lora"],
            "language_modeling",
            "the adapter's base: keep it as it is; that run's checkpoint.keep may delete it",
        ),
        ([], "dpo", "the objective's reference: keep it as it is; that run's checkpoint.keep may"),
        ([], ("dpo", {"precompute": True}), None),
        ([], ("distillation", {"teacher": "/models/large"}), None),
    ],
)
def test_first_weights_that_every_start_reads_are_said(config, overrides, objective, said):
    given = config("model.path=/runs/mine/step-00000001.a1", *overrides)
    name, args = (objective, {}) if isinstance(objective, str) else objective
    found = read_at_each_start(given, build_objective(replace(given.objective, name=name, args=args)))
    assert found is None if said is None else f"reads {given.model.path} again, {said}" in found


def test_it_is_said_at_the_first_start_that_an_adapter_needs_its_base(config, tmp_path, capsys):
    pytest.importorskip("peft", reason="adapters by LoRA need the extra areal_ray[lora]")
    of = config("model.config.hidden_size=32", "model.config.num_hidden_layers=1").model
    model = build_model(of)
    materialise(model, torch.device("cpu"))
    init_weights(model, seed=0)
    theirs = LocalStorage(tmp_path / "theirs")
    theirs.ensure()
    info = {"step": 1, "attempt": 1, "hf_config": architecture(of), "tokenizer": "bytes"}
    save(theirs.sub(Catalog.name(1, 1)), {"engine": DCPState(model)}, info, Ranks())
    checked = config("model=pretrained", f"model.path={tmp_path}/theirs", f"adapter={json.dumps(LORA)}")
    prepare(checked)
    assert f"every start of this run reads {tmp_path}/theirs/step-00000001.a1 again" in capsys.readouterr().out


def test_a_home_directory_is_looked_at_where_it_is(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ckpt").mkdir()
    assert config("model.path=~/ckpt").model.path == "~/ckpt"
    (tmp_path / "ckpt" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="give either"):
        config("model.path=~/ckpt")
