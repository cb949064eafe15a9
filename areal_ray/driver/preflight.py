"""Preflight checks: every mistake that can be found before anything is trained or written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from areal_ray import data, models
from areal_ray.checkpoint import Catalog
from areal_ray.config import Config, ConfigError, ModelConfig, in_steps, plugin, redact
from areal_ray.data.corpus.corpus import TokenSource
from areal_ray.data.dataset import is_same
from areal_ray.data.rendering.special import prompt_ids, trained_tokens
from areal_ray.data.splits import Splits, check_sizes, open_sets, open_splits, own_splits
from areal_ray.data.tokenizers import Tokenizer, check_of_model
from areal_ray.distributed import Ranks
from areal_ray.distributed.recompute import recompute_activations
from areal_ray.distributed.tensor_parallel import tensor_plan
from areal_ray.driver.data import Make, make_corpus, sources_of
from areal_ray.driver.first_weights import read_at_each_start, says_what_it_is, with_first_weights
from areal_ray.driver.on_end import check_on_end
from areal_ray.engine import Objective, first_weights, hidden
from areal_ray.engine.adapters import other_base
from areal_ray.engine.objectives import build_objective
from areal_ray.engine.optim import MuonWithAdamW, build_optimizer, freeze, same_state
from areal_ray.models.adapters import quick_fingerprint
from areal_ray.models.adapters.files import check_alone
from areal_ray.models.generation import source_generation
from areal_ray.models.masking import keeps_no_documents_apart
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage, Storage, storage_at
from areal_ray.train.own_evaluation import build_evaluator
from areal_ray.train.trackers import check_tracker

Sources = dict[str, TokenSource]


def prepare(
    config: Config, make: Make = make_corpus, look: Callable[[nn.Module, Splits, Sources], None] = lambda *_: None
) -> tuple[RunDir, Config, Sources]:
    """Checks a config, model, data and run directory without a cluster, and makes the storage path absolute.

    Args:
        config: as loaded.
        make: prepares data that are not prepared yet; the last thing before what needs them is checked.
        look: called at the end with the model on the meta device, the rows, and the tokens to train on.

    Returns:
        The run directory, the config with an absolute storage path and all lengths in steps, and the tokens to train
        and evaluate on by the name of their corpus; none for a source of one's own.

    Raises:
        ConfigError: if the run could not start, or must not touch what it would find.
    """
    try:
        storage = storage_at(config.run.storage_path, asdict(config.run.s3))
    except ValueError as error:
        raise ConfigError("run.storage_path", str(error)) from None
    _check_writable(config, storage)
    config = replace(config, run=replace(config.run, storage_path=storage.location))
    run = RunDir(storage.sub(config.run.name))
    catalog = Catalog(run.storage)
    newest, goes_on = catalog.newest(), catalog.last_committed() is not None
    config = with_first_weights(config, newest.info if newest is not None else {})
    tokenizer = data.build_tokenizer(config.data.tokenizer)
    if says_what_it_is(config.model) and not config.data.allow_other_tokenizer:
        assert config.model.path
        check_of_model(config.data.tokenizer, tokenizer, config.model.path)
    if config.model.path and not goes_on:  # afterwards nobody reads them but for references
        config = replace(config, model=first_weights.examine(config.model, _print, Ranks()))
    model = _check_model(config, tokenizer.vocab_size)
    objective = build_objective(config.objective)
    _check_plugins(config, model, tokenizer, objective)
    if not goes_on and (text := read_at_each_start(config, objective)):
        _print(text)
    _check_evaluations(config, tokenizer)
    if config.export is not None:
        _check_export(config, tokenizer)
        _check_adapter_export(config)
    if config.run.recover == "fresh" and run.exists():
        raise ConfigError(
            "run.recover", f"`fresh`, but {run.storage.location} holds a run already; choose another run.name"
        )
    if config.run.recover == "resume" and not goes_on:
        raise ConfigError("run.recover", f"`resume`, but {run.storage.location} holds no checkpoint")
    sources = sources_of(config, run, tokenizer, goes_on, _print, make)
    seq_len, batch = config.train.seq_len, config.train.global_batch_size
    trained: Sources = {}
    if plugin.is_plugin(config.data.source):
        splits = own_splits(config.data, tokenizer, seq_len)
    else:
        trained = {name: sources[name] for name in config.data.sources}
        splits = open_splits(config.data, trained, seq_len)
        if note := getattr(splits[0], "note", ""):
            _print(note)
    check_sizes(splits, config.data, trained, seq_len, batch)
    open_sets(config.evaluation_sets, sources, tokenizer, seq_len, batch)
    given, config = config, in_steps(config, len(splits[0]))
    if not given.train.steps:
        _print(f"{given.length}: {config.length} of {config.train.global_batch_size:,} samples")
    if newest is not None and newest.manifest is not None:
        _check_continues(newest.manifest.info, config, splits[0])
        _check_same_batch(newest.manifest.info, given)
    look(model, splits, trained)
    return run, config, sources


def serving(config: Config) -> dict[str, Any]:
    """What checkpoints say for who uses the model later: the special tokens that it is trained with, how its source
    generates, and for a factory's model that is one of transformers, its class and config.

    Found here once, and not by every start of the workers, as a large tokenizer takes a second to load.

    Raises:
        ConfigError: if the tokenizer lacks what the data need.
    """
    tokens = trained_tokens(config.data, data.build_tokenizer(config.data.tokenizer))
    return {
        "tokens": tokens,
        "generation": source_generation(config.model),
        "factory": models.factory_architecture(config.model),
    }


def _print(text: str) -> None:
    print(text, flush=True)


def _check_plugins(config: Config, model: nn.Module, tokenizer: Tokenizer, objective: Objective) -> None:
    """Resolve the code that the configuration names, and check its arguments as far as that is possible."""
    for name, given in objective.reference_models.items():
        _check_reference(config, name, given, tokenizer)
    _check_optimizer(config, model)
    for i, tracker in enumerate(config.trackers):
        check_tracker(tracker, f"trackers[{i}]")
    check_on_end(config.on_end)


def _check_optimizer(config: Config, model: nn.Module) -> None:
    """Make the optimizer on a model without memory; of one's own only the arguments are looked at."""
    optim = config.optim
    freeze(model, optim.groups)
    if plugin.is_plugin(optim.name):
        make = plugin.factory(optim.name, "optim.name", {})
        plugin.check_args(make, optim.name, "optim.args", [], **optim.args)
        return
    made = build_optimizer(model, optim)
    if isinstance(made, MuonWithAdamW):
        print(made.about(model), flush=True)


def _check_evaluations(config: Config, tokenizer: Tokenizer) -> None:
    """Find out whether prompts can be gone on with, and make the user's own evaluators once."""
    if (generate := config.eval.generate) is not None:
        prompts = prompt_ids(config.data, tokenizer, generate.prompts, generate.chat)
        if not all(prompts):
            raise ConfigError("eval.generate.prompts", "must each give a token at least")
        longest = max(map(len, prompts)) + generate.max_new_tokens
        try:
            models.check_model(config.model, models.build_model(config.model), tokenizer.vocab_size, longest)
        except ConfigError as error:
            raise ConfigError("eval.generate.max_new_tokens", error.message) from None
    for i, own in enumerate(config.eval.evaluators):
        build_evaluator(own, f"eval.evaluators[{i}]")


def _check_export(config: Config, tokenizer: Tokenizer) -> None:
    """Find out whether exports can be made: a class for the model, and the tokens that they are to have."""
    wanted = config.export
    assert wanted is not None
    if config.model.factory:
        if config.adapter is not None:
            raise ConfigError("export", "an adapter of a factory's model cannot be exported")
        made = models.factory_architecture(config.model)
        if made is None:
            text = (
                f"{config.model.factory} makes no transformers PreTrainedModel, of which alone there are such exports"
            )
            raise ConfigError("export", text)
        if wanted.model_class is None and not made["class"].startswith("transformers."):
            raise ConfigError("export.model_class", f"name the class of the factory's model, {made['class']}")
        if wanted.model_class is not None:
            models.build_of_class(wanted.model_class, made["config"], "export.model_class")
    vocabulary = tokenizer.transformers().get_vocab()
    for role in ("bos_token", "eos_token", "pad_token"):
        text = getattr(wanted, role)
        if text is not None and text not in vocabulary:
            raise ConfigError(f"export.{role}", f"{config.data.tokenizer or 'bytes'} has no token {text!r}")


def _check_adapter_export(config: Config) -> None:
    """Refuse exports of an adapter that could not be read alone."""
    if config.adapter is not None:
        try:
            check_alone(config.model.path, config.model.merge_adapter)
        except ValueError as error:
            raise ConfigError("export", f"must be null, as {error}") from None


def _check_model(config: Config, vocab_size: int) -> nn.Module:
    """Build the model without memory, and find what it cannot do; say what it does in another way than is usual."""
    model = models.build_model(config.model)
    models.check_model(config.model, model, vocab_size, config.train.seq_len)
    if config.data.document_mask and (why := keeps_no_documents_apart(model)):
        raise ConfigError("data.document_mask", f"{why}; without it documents of a row see each other")
    trained = model if config.adapter is None else models.build_adapted(config.model, config.adapter)[0]
    units = models.shard_units(trained, config.model.shard_units)
    split = config.engine.mesh.tensor > 1
    if split:
        tensor_plan(model, config.engine.mesh.tensor)
    if config.engine.recomputed.every:  # tried on another one: operations are counted on this one as if nothing was
        blank = models.build_model(config.model)
        recompute_activations(blank, models.shard_units(blank, config.model.shard_units), config.engine.recomputed)
    if config.model.attention == "auto" and models.attention_of(model) not in (None, "sdpa"):
        name = type(model).__name__
        print(f"{name} has no scaled_dot_product_attention: its attention is {models.attention_of(model)}", flush=True)
    try:
        models.output_layer(trained, units, split)
    except models.NoOutputLayer as error:
        if hidden.choose(config, vocab_size, why_not=None) == "chunked":
            hidden.choose(config, vocab_size, str(error))
            print(f"the loss is computed with all logits of a micro-batch at once: {error}", flush=True)
    if config.adapter is not None:
        count, own = (sum(p.numel() for p in trained.parameters() if p.requires_grad >= least) for least in (0, 1))
        print(
            f"adapter {config.adapter.name}: {count:,} parameters, {own:,} of them trained ({own / count:.2%})",
            flush=True,
        )
    return trained


def _check_reference(config: Config, name: str, given: ModelConfig, tokenizer: Tokenizer) -> None:
    """Find out whether a frozen model of the objective can be built and read, and knows the same tokens."""
    try:
        wanted = first_weights.resolve(given, _print).model
        if wanted.path != (given.path and os.path.expanduser(given.path)):
            text = f"{given.path} is not one model for good: give a Hugging Face directory, or one checkpoint of a run"
            raise ConfigError("model.path", text)
        model = models.build_model(wanted)
        models.check_model(wanted, model, tokenizer.vocab_size, config.train.seq_len)
        models.shard_units(model, wanted.shard_units)
        if config.engine.mesh.tensor > 1:
            tensor_plan(model, config.engine.mesh.tensor)
        if wanted.path:
            if says_what_it_is(wanted) and not config.data.allow_other_tokenizer:
                check_of_model(config.data.tokenizer, tokenizer, wanted.path)
            first_weights.examine(wanted, _print, Ranks())
    except ConfigError as error:
        raise ConfigError("objective.args", f"{name}: {error.message}") from None


def _check_continues(saved: dict[str, Any], config: Config, sequences: data.TokenDataset) -> None:
    """Compares a checkpoint's run with the one that is asked for, in all that must not differ to go on."""
    if not {"model", "seed", "data"} <= set(saved):
        return  # an engine's own save, put here by hand; the workers compare the state itself
    before, now = saved["model"], redact(asdict(config.model))
    old, new = before["config"], now["config"]
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    values = ", ".join(f"{key} was {old.get(key)} and is {new.get(key)}" for key in changed[:4])
    if not changed and _tied_otherwise(before.get("tie"), config.model):
        changed, values = ["tie"], f"model.tie was {before.get('tie')} and is {config.model.tie}"
    found = {
        "model.config": f"this run's checkpoints are of another model: {values}" if changed else "",
        "model.path": "this run's checkpoints are of another architecture"
        if _other_architecture(saved.get("hf_config"), config.model)
        else "",
        "model.factory": f"this run's checkpoints were made with {before['factory']}"
        if before["factory"] != now["factory"]
        else "",
        "run.seed": f"this run's data are in the order of seed {saved['seed']}"
        if saved["seed"] != config.run.seed
        else "",
        "data": "files, tokenizer or train.seq_len are not those that this run has trained on"
        if "data" not in config.run.allow_changes and not is_same(sequences, saved["data"])
        else "",
    }
    _check_adapter_continues(saved.get("adapter"), config)
    if config.model.path and "adapter" in saved and "model.path" not in config.run.allow_changes:
        _check_base(saved["adapter"]["base"], config)
    _check_optimizer_continues(saved.get("config", {}).get("optim", {}), config)
    for key, problem in found.items():
        if problem and key not in config.run.allow_changes:
            hint = f"; choose another run.name, or go back, or say run.allow_changes='[{key}]'"
            raise ConfigError(key, problem + hint)


def _other_architecture(saved: dict[str, Any] | None, model: ModelConfig) -> bool:
    """Whether the model that model.path says is another one than that of the checkpoints; a factory's says nothing."""
    return bool(model.path and saved and not model.factory) and not models.same_architecture(saved or {}, model)


def _tied_otherwise(before: bool | None, model: ModelConfig) -> bool:
    """Whether model.tie makes another model of the same model.config: one with another number of weights.

    Not compared with the config in the checkpoint: what that leaves out may be another version's default.
    """
    if not model.config or model.path:
        return False
    return not models.same_architecture(models.architecture(replace(model, tie=before)) or {}, model)


def _check_adapter_continues(saved: dict[str, Any] | None, config: Config) -> None:
    """Refuse another adapter, or one where there was none: there is no state for it in the checkpoints."""
    now = None if config.adapter is None else redact(asdict(config.adapter))
    before = None if saved is None else {"name": saved["name"], "args": saved["args"]}
    if before != now:
        was = "no adapter" if before is None else f"the adapter {before['name']} with {before['args']}"
        is_now = "none" if now is None else f"{now['name']} with {now['args']}"
        text = f"this run's checkpoints are of {was}, and now it is {is_now}; choose another run.name, or go back"
        raise ConfigError("adapter", text)


def _check_base(saved: dict[str, Any], config: Config) -> None:
    """Look at some values of the base that an adapter was trained on; the workers look at all of them."""
    assert config.model.path
    weights = first_weights.fitted(config.model, Ranks()).weights
    if (was := saved.get("quick")) not in (None, now := quick_fingerprint(weights)):
        raise other_base(config, str(was), now)


def _check_same_batch(saved: dict[str, Any], given: Config) -> None:
    """Refuse to count a run in samples or epochs whose steps had other numbers of samples before."""
    before = saved.get("config", {}).get("train", {}).get("global_batch_size", given.train.global_batch_size)
    if not given.train.steps and before != given.train.global_batch_size:
        text = f"was {before} when this run was saved: give its length in train.steps, not as {given.length}"
        raise ConfigError("train.global_batch_size", text)


def _check_optimizer_continues(saved: dict[str, Any], config: Config) -> None:
    """Refuse another optimizer, or other frozen parameters: there is no state for them in the checkpoints."""
    before = saved.get("name", "adamw")  # absent from older checkpoints
    if before != config.optim.name:
        text = f"this run's checkpoints have the state of {before}; choose another run.name, or go back"
        raise ConfigError("optim.name", text)
    if not same_state(before, saved.get("args", {}), config.optim.args):
        text = f"this run's checkpoints have the state of {before} with {saved.get('args')}; choose another run.name"
        raise ConfigError("optim.args", text)
    if saved.get("ema") is not None and config.optim.ema is None:
        text = "this run's checkpoints have averages of the weights; choose another run.name, or go back"
        raise ConfigError("optim.ema", text)
    frozen = [group["pattern"] for group in saved.get("groups", []) if group["freeze"]]
    now = [group.pattern for group in config.optim.groups if group.freeze]
    if frozen != now:
        text = f"this run's checkpoints were made with {frozen} frozen, and now it is {now}; choose another run.name"
        raise ConfigError("optim.groups", text)


def _check_writable(config: Config, storage: Storage) -> None:
    if not isinstance(storage, LocalStorage):
        _try_writing(storage)
        return
    path = Path(storage.location)
    if (
        "runtime_resources/working_dir_files" in os.getcwd()
        and not Path(config.run.storage_path).expanduser().is_absolute()
    ):
        raise ConfigError(
            "run.storage_path", "is relative, but a submitted job runs in a folder that Ray deletes; make it absolute"
        )
    while not path.exists():
        path = path.parent
    if not (path.is_dir() and os.access(path, os.W_OK)):
        raise ConfigError("run.storage_path", f"cannot write below {path}")


def _try_writing(storage: Storage) -> None:
    name = f".areal_ray-{secrets.token_hex(4)}"
    try:
        storage.replace(name, b"can this be written?\n")
        storage.remove(name)
    except OSError as error:
        raise ConfigError("run.storage_path", str(error)) from None
