"""Evaluation of a checkpoint apart from training: on the data of its run, or on other files."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from areal_ray.checkpoint import reader
from areal_ray.checkpoint.format.manifest import read_manifest
from areal_ray.config import EVALUATION, Config, ConfigError, DataConfig, SourceConfig, load, plugin
from areal_ray.data import TokenDataset, build_tokenizer
from areal_ray.data.byte_lengths import byte_lengths
from areal_ray.data.corpus import planning, prepare
from areal_ray.data.corpus.corpus import Corpus, TokenSource
from areal_ray.data.in_order import InOrder
from areal_ray.data.splits import open_set, open_source, open_splits, own_splits
from areal_ray.distributed import Ranks
from areal_ray.driver.first_weights import with_first_weights
from areal_ray.engine.fsdp import FSDPEngine
from areal_ray.engine.next_token import NextToken
from areal_ray.engine.objectives import LanguageModeling, build_objective
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage, Storage, storage_at
from areal_ray.train.evaluation import Evaluator

_SUFFIXES = {".jsonl": "jsonl", ".parquet": "parquet", ".csv": "csv"}
_METRICS = ("perplexity", "bits_per_byte", "accuracy")


@dataclass(frozen=True)
class Asked:
    """What is to be evaluated.

    Args:
        checkpoint: a committed one.
        config: file of the experiment; None: what the checkpoint says, but for code and tokenizers that it only names.
        overrides: key=value, of either.
        data: files, directories or globs instead of the run's held-out data.
        source: as data.source; None: by the suffix of the files.
        tokenizer: as data.tokenizer; None: that of the file, or of the checkpoint if it is the one of bytes.
        rows: at most so many of each set; None: all.
    """

    checkpoint: str
    config: str | None = None
    overrides: Sequence[str] = ()
    data: Sequence[str] = ()
    source: str | None = None
    tokenizer: str | None = None
    rows: int | None = None


def evaluate(asked: Asked) -> dict[str, dict[str, float]]:
    """Loss and other means of a checkpoint over every row of each set, once. Under torchrun, a collective of its ranks.

    Needs memory for weights and activations on each rank, shared by the ranks; no cluster and no optimizer.

    Returns:
        The metrics by the names of the sets; `held_out` is what data.held_out keeps back, `data` what was given.

    Raises:
        ConfigError: if the configuration is at fault.
        ValueError: if the checkpoint says too little, or names what is not loaded unasked; if there are no such data;
            on every rank, if a frozen model of its objective is another one now.
        CheckpointDamaged: if its manifest cannot be read. RankError: if its bytes are not those that were written.
    """
    checkpoint = storage_at(asked.checkpoint)
    info = read_manifest(checkpoint).info
    config = _config(asked, info, checkpoint.location)
    objective = build_objective(config.objective)
    if objective.references and asked.config is None:
        names = ", ".join(objective.references)
        text = f"{checkpoint.location} is of an objective with a frozen model ({names}), which is not loaded unasked"
        raise ValueError(f"{text}: give --config, its experiment")
    # Before data are read: it makes the process group.
    engine = FSDPEngine(config, device="cuda" if config.cluster.use_gpu else "cpu")
    loss = info.get("loss") if config.model.loss == "auto" else None
    base = ((info.get("adapter") or {}).get("base") or {}).get("fingerprint")
    engine.initialize(
        weights=False,
        references=objective.references,
        reference_models=objective.reference_models,
        loss=loss,
        base=base,
        trains=False,
    )
    ranks = Ranks()
    try:
        _check_references(info, engine.references, checkpoint.location)
        reader.load(checkpoint, {"engine": engine.weights}, ranks, part=True)
        found: dict[str, dict[str, float]] = {}
        with _sets(asked, config, checkpoint.location, ranks) as sets:
            scored = objective
            if isinstance(objective, LanguageModeling):
                lengths = torch.from_numpy(byte_lengths(build_tokenizer(config.data.tokenizer)))
                scored = NextToken(objective, _METRICS, lengths.to(engine.device))
            for name, rows in sets.items():
                found[name] = _one(engine, rows, scored, config.train.micro_batch_size, asked.rows)
        return found
    finally:
        engine.destroy()


def _check_references(info: Mapping[str, Any], now: Mapping[str, str], location: str) -> None:
    """Raise ValueError, on every rank, if a frozen model is another one than when the checkpoint was saved."""
    before = info.get("references") or {}
    other = [name for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
    if not other:
        return
    name = other[0]
    text = (
        f"the frozen model `{name}` is not the one of {location} (fingerprint {now[name][:12]}, then "
        f"{before[name][:12]}): the numbers would be those of another comparison. Give the objective, run.seed and "
    )
    path = ((info.get("config") or {}).get("model") or {}).get("path")
    raise ValueError(f"{text}model.path that its run had{f' ({path})' if path else ''}")


def _one(engine: FSDPEngine, rows: TokenDataset, objective: Any, per_rank: int, most: int | None) -> dict[str, float]:
    def opened() -> InOrder:
        return InOrder(rows, per_rank, engine.dp_rank, engine.dp_size, most)

    if not opened().batches:
        return {}
    return {**Evaluator(engine, opened, opened().batches, objective, prefix="").run(), "rows": opened().count}


def _config(asked: Asked, info: Mapping[str, Any], location: str) -> Config:
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    here = [
        f"cluster.num_workers={workers}",
        f"cluster.use_gpu={torch.cuda.is_available()}",
        "faults=[]",
        "trackers=[]",
    ]
    # The mesh of this evaluation, and a batch that it can share: rows are taken as `InOrder` gives them.
    here += ["engine.mesh={replicate: 1, shard: -1, tensor: 1}", f"train.global_batch_size={workers}", "export=null"]
    tokenizer = [] if asked.tokenizer is None else [f"data.tokenizer={asked.tokenizer}"]
    if asked.config is not None:
        return _settled(load(asked.config, [*here, *tokenizer, *asked.overrides]), info)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.yaml"
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(_recorded(asked, info, location))))
        try:
            return _settled(load(str(path), [*here, *tokenizer, *asked.overrides]), info)
        except ConfigError as error:
            source = error.source if error.source == "command line" else f"the config of {location}"
            raise ConfigError(error.key, error.message, source) from None


def _settled(config: Config, info: Mapping[str, Any]) -> Config:
    """With what lies at model.path, whether the model is tied, and a length in steps.

    That the engine needs, and nothing that is evaluated depends on it.
    """
    config, saved = with_first_weights(config, {}), info.get("config") or {}
    model, steps = config.model, (saved.get("train") or {}).get("steps") or 1
    if model.tie is None and not model.factory:  # by the weights, of which those at model.path are not looked at
        config = replace(config, model=replace(model, tie=(saved.get("model") or {}).get("tie")))
    train = replace(config.train, steps=steps, samples=None, epochs=None, stop_at=None)
    warmup: dict[str, Any] = {"warmup_steps": 0, "warmup_samples": None, "warmup_epochs": None}
    decay: dict[str, Any] = {"decay_steps": None, "decay_samples": None, "decay_epochs": None}
    return replace(config, train=train, optim=replace(config.optim, **warmup, **decay))


def _recorded(asked: Asked, info: Mapping[str, Any], location: str) -> dict[str, Any]:
    """The sections of a checkpoint's config that an evaluation needs, without what is not loaded unasked."""
    settings = info.get("config")
    if not settings or not info.get("hf_config"):
        raise ValueError(f"{location} does not say which transformers model it is of: give --config, its experiment")
    if "adapter" in info:
        raise ValueError(f"{location} has an adapter, whose base is not read unasked: give --config, its experiment")
    data, objective, evaluation = (dict(settings.get(key) or {}) for key in ("data", "objective", "eval"))
    sets = {name: dict(each) for name, each in (evaluation.get("sets") or {}).items()}
    named = [objective.get("name", ""), data.get("source", ""), *(str(each.get("source")) for each in sets.values())]
    if code := [name for name in named if plugin.is_plugin(name)]:
        raise ValueError(f"{location} names {code[0]}, and code is not run unasked: give --config, its experiment")
    tokenizer = data.get("tokenizer") or "bytes"
    if asked.tokenizer is None and tokenizer != "bytes":
        raise ValueError(
            f"the run's tokenizer was {tokenizer!r}, and what a checkpoint names is not loaded unasked: "
            f"give --tokenizer {shlex.quote(tokenizer)}"
        )
    data["tokenizer"] = asked.tokenizer or tokenizer
    model = {key: (settings.get("model") or {}).get(key) for key in ("attention", "loss", "shard_units")}
    model = {key: value for key, value in model.items() if value is not None}
    train = {key: (settings.get("train") or {})[key] for key in ("micro_batch_size", "seq_len")}
    precision = (settings.get("engine") or {}).get("precision")
    return {
        "run": {"seed": info.get("seed", 0)},
        "model": {"config": dict(info["hf_config"]), **model},
        "data": data,
        "objective": objective,
        "engine": {"precision": precision},
        "train": train,
        "eval": {"sets": sets},
    }


@contextmanager
def _sets(asked: Asked, config: Config, location: str, ranks: Ranks) -> Iterator[dict[str, TokenDataset]]:
    """Rows by the names of their sets, for as long as the context lasts."""
    if not asked.data:
        yield _of_run(config, location)
        return
    with tempfile.TemporaryDirectory(prefix="areal_ray-data-") as folder:
        data = _given(asked, config)
        source = open_source(data, asdict(config.run.s3))
        if source is None:
            # Ranks of several machines would need a folder that all of them see: run.storage_path of the experiment.
            shared = storage_at(config.run.storage_path).sub("data") if asked.config else LocalStorage(folder)
            place = ranks.on_rank_zero(lambda: _prepared(data, config, shared).location)
            source = Corpus(storage_at(place, asdict(config.run.s3)))
        yield {"data": open_set(data, source, config.train.seq_len)}


def _given(asked: Asked, config: Config) -> DataConfig:
    suffixes = {_SUFFIXES.get(Path(path).suffix.lower(), "text") for path in asked.data}
    if asked.source is None and len(suffixes) > 1:
        raise ValueError(
            f"files of several kinds ({', '.join(sorted(suffixes))}): say --source, or give them one by one"
        )
    source = asked.source or suffixes.pop()
    plain = SourceConfig()
    # Format and fields are those of the run, which know how its records are rendered.
    keys = ("args", "held_out_paths")
    own = {key: getattr(plain, key) for key in keys}
    format_ = "text" if source == "text" else config.data.format
    return replace(config.data, mixture=[], source=source, paths=list(asked.data), held_out=0.0, format=format_, **own)


def _prepared(data: DataConfig, config: Config, folder: Storage) -> Storage:
    plan = planning.make_plan(data, build_tokenizer(data.tokenizer), folder, asdict(config.run.s3))
    if not prepare.is_prepared(plan.work.storage):
        prepare.prepare(plan, prepare.in_process, lambda _: None)
    return plan.work.storage


def _of_run(config: Config, location: str) -> dict[str, TokenDataset]:
    """The held-out rows and evaluation sets of the run that a checkpoint lies in."""
    seq_len, s3 = config.train.seq_len, asdict(config.run.s3)
    run = RunDir(storage_at(location.rpartition("/")[0], s3))
    noted = run.data() or {}
    sources: dict[str, TokenSource] = {}
    for name, data in config.corpora.items():
        source = open_source(data, s3)
        if source is None and name not in noted:
            raise ValueError(f"{run.storage.location} does not say where the data of its run lie: give --data")
        sources[name] = source or Corpus(storage_at(noted[name]["path"], s3))
    tokenizer = build_tokenizer(config.data.tokenizer)
    if plugin.is_plugin(config.data.source):
        held_out = own_splits(config.data, tokenizer, seq_len)[1]
    else:
        held_out = open_splits(config.data, sources, seq_len)[1]
    found = {"held_out": held_out} if len(held_out) else {}
    for name, data in config.evaluation_sets.items():
        own = sources.get(f"{EVALUATION}{name}")
        key = f"eval.sets.{name}"
        found[name] = own_splits(data, tokenizer, seq_len, key)[1] if own is None else open_set(data, own, seq_len)
    if not found:
        raise ValueError("the run holds nothing out: give --data")
    return found
