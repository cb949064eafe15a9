"""Rules of a configuration beyond keys and types, checked once, before anything is started."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from areal_ray.config.data_rules import check_data
from areal_ray.config.errors import ConfigError
from areal_ray.config.eval_rules import check_eval, check_metric
from areal_ray.config.lengths import check_lengths
from areal_ray.config.model_rules import check_model
from areal_ray.config.numbers import check_numbers
from areal_ray.config.objective_rules import OBJECTIVES, check_objective
from areal_ray.config.plugin import check_form, is_plugin
from areal_ray.config.types import Recomputed, StandbyCount, WorkerRange

if TYPE_CHECKING:
    from areal_ray.config import Config

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What a run cannot go on with if it is not what the checkpoint says, unless the user says so.
ALLOWABLE = ("data", "run.seed", "model.config", "model.path", "model.factory", "objective")
# Variables that Ray, torch or the driver set, for each process or for all.
_OWNED = re.compile(
    r"RAY_.*|AREAL_RAY_.*|(CUDA|HIP|ROCR)_VISIBLE_DEVICES|(LOCAL_|GROUP_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
    r"|PYTHONPATH|PYTHONHOME|PYTORCH_NVML_BASED_CUDA_CHECK"
)

OPTIMIZERS = ("adamw", "muon", "adafactor", "sgd")
_WITH_ARGS = ("muon", "adafactor", "sgd")  # parts of this package whose arguments stand in args
_NOT_TOLD_ON_DEVICE = ("muon", "adafactor", "sgd")  # see TrainEngine.skips_on_device
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def check(config: Config) -> None:
    """Raise ConfigError for the first rule that the config breaks."""
    check_numbers(config)
    _check_run(config)
    check_model(config.model)
    _check_env(config)
    _check_plugins(config)
    check_data(config)
    check_objective(config)
    check_eval(config)
    _check_train(config)
    _check_sizes(config)
    _check_resources(config)
    _check_faults(config)
    _check_saves(config)
    _check_keep(config)


def _check_run(config: Config) -> None:
    if not _NAME.fullmatch(config.run.name) or ".." in config.run.name:
        raise ConfigError("run.name", f"{config.run.name!r} must be letters, digits, '.', '_' or '-', without '..'")
    path = config.run.storage_path
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/+", path):
        meant = "s3://" + path[scheme.end() :] if scheme[1] == "s3" else "/" + path[scheme.end() :]
        if scheme[0] != "s3://" and scheme[1] in ("s3", "file"):
            raise ConfigError(
                "run.storage_path", f"must be a path that every node sees, or s3://bucket/prefix: {meant}?"
            )
    if path.startswith("~") and os.path.expanduser(path) == path:
        raise ConfigError("run.storage_path", f"{path.partition('/')[0]!r} is no user of this machine")
    s3 = config.run.s3
    if bool(s3.access_key) != bool(s3.secret_key):
        raise ConfigError("run.s3", "access_key and secret_key go together; or neither, for those of the environment")
    if s3.endpoint and not re.fullmatch(r"https?://[^/@\s]+/?", s3.endpoint):
        raise ConfigError("run.s3.endpoint", "must be http(s)://host or http(s)://host:port, without credentials")
    if config.run.private and path.startswith("s3://"):
        raise ConfigError("run.private", "is for directories; who may read in S3 is up to the bucket's policy")
    if not 0 <= config.run.seed < 2**32:
        raise ConfigError("run.seed", f"must be in [0, 2**32), not {config.run.seed}")
    if other := set(config.run.allow_changes) - set(ALLOWABLE):
        raise ConfigError("run.allow_changes", f"knows {', '.join(ALLOWABLE)}; not {', '.join(sorted(other))}")
    StandbyCount.parse(config.cluster.standbys)
    Recomputed.parse(config.engine.activation_checkpointing)
    if (fast := config.cluster.fast_restarts) not in ("auto", "off", False):
        raise ConfigError("cluster.fast_restarts", f"must be auto or off, not {fast!r}")
    if config.cluster.max_failures < -1:
        raise ConfigError("cluster.max_failures", "must be -1 (no limit), 0 or more")


def _check_env(config: Config) -> None:
    for name, value in config.cluster.env.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError("cluster.env", f"{name!r} is no name of a variable")
        if _OWNED.fullmatch(name):
            raise ConfigError(f"cluster.env.{name}", "is set by the job itself, for each of its processes")
        if "$" in value:  # which Ray would replace on each node, and nobody else
            raise ConfigError(f"cluster.env.{name}", "is taken as it is, without other variables in it: write $ out")


def _check_plugins(config: Config) -> None:
    """Parts are named: this package's by a short name, the user's as package.module:name."""
    parts: tuple[tuple[str, str, tuple[str, ...], str, dict[str, Any]], ...] = (
        ("optim.name", config.optim.name, OPTIMIZERS, "optim.args", config.optim.args),
        ("objective.name", config.objective.name, OBJECTIVES, "objective.args", {}),  # it checks its args itself
    )
    for key, name, builtin, args_key, args in parts:
        if is_plugin(name):
            check_form(name, key)
        elif name not in builtin:
            known = ", ".join(builtin)
            raise ConfigError(key, f"knows {known}, or package.module:name for your own; not {name!r}")
        elif args and name not in _WITH_ARGS:
            raise ConfigError(args_key, f"are for your own package.module:name; {name!r} takes none")
    if config.adapter is not None:
        if is_plugin(config.adapter.name):
            check_form(config.adapter.name, "adapter.name")
        elif config.adapter.name != "lora":
            raise ConfigError("adapter.name", f"knows lora, or package.module:Class; not {config.adapter.name!r}")
        if config.engine.mesh.tensor > 1:
            text = "with an adapter it must be 1: layers that it changes are not split"
            raise ConfigError("engine.mesh.tensor", text)
        if config.model.allow_missing:
            raise ConfigError("model.allow_missing", "with an adapter all of its base must be there")
    if config.model.factory:
        check_form(config.model.factory, "model.factory")
    elif config.model.args:
        raise ConfigError("model.args", "are for model.factory, which is not set")
    for i, tracker in enumerate(config.trackers):
        if tracker.name not in TRACKERS:
            if not is_plugin(tracker.name):
                text = f"knows {', '.join(TRACKERS)}, or package.module:name for your own; not {tracker.name!r}"
                raise ConfigError(f"trackers[{i}].name", text)
            check_form(tracker.name, f"trackers[{i}].name")
    if config.on_end is not None and not config.on_end.strip():
        raise ConfigError("on_end", "is empty: give package.module:name, a command, or null")
    for i, group in enumerate(config.optim.groups):
        try:
            re.compile(group.pattern)
        except re.error as error:
            raise ConfigError(f"optim.groups[{i}].pattern", f"{group.pattern!r} is no pattern: {error}") from None
        for name in ("lr_scale", "weight_decay"):
            value = getattr(group, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"optim.groups[{i}].{name}", f"must be 0 or more, not {value}")


def _check_train(config: Config) -> None:
    train, optim = config.train, config.optim
    check_lengths(config)
    if train.bad_step.lag and optim.name in _NOT_TOLD_ON_DEVICE:
        text = f"1 needs an optimizer that can be told on the device to change nothing, and {optim.name} cannot: use 0"
        raise ConfigError("train.bad_step.lag", text)
    if train.seq_len < 2:
        raise ConfigError("train.seq_len", "must be at least 2: one token to predict the next from")
    factor = train.bad_step.spike_factor
    if factor is not None and not factor > 1:
        raise ConfigError("train.bad_step.spike_factor", f"must be greater than 1, or null for no limit, not {factor}")
    if optim.schedule != "wsd" and (optim.decay_steps, optim.decay_samples, optim.decay_epochs) != (None, None, None):
        raise ConfigError("optim.schedule", f"wsd alone has a decay at its end, not {optim.schedule}")
    if not 0 <= optim.min_lr_ratio <= 1:
        raise ConfigError("optim.min_lr_ratio", f"must be between 0 and 1, not {optim.min_lr_ratio}")
    if optim.weight_decay < 0:
        raise ConfigError("optim.weight_decay", f"must be 0 or more, not {optim.weight_decay}")
    if optim.ema is not None and not 0 <= optim.ema.decay < 1:
        raise ConfigError("optim.ema.decay", f"must be in [0, 1), not {optim.ema.decay}")
    if config.eval.ema and optim.ema is None:
        raise ConfigError("eval.ema", "needs averages of the weights: optim.ema={}")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError("optim.betas", f"must be in [0, 1), not {list(optim.betas)}")


def _check_sizes(config: Config) -> None:
    WorkerRange.parse(config.cluster.num_workers)
    workers, mesh = config.cluster.num_workers, config.engine.mesh
    if isinstance(workers, list):
        if not config.usable_sizes:
            sizes = [size for size in (mesh.replicate, mesh.shard, mesh.tensor) if size != -1]
            raise ConfigError(
                "cluster.num_workers",
                f"no number in {workers} is a multiple of the mesh ({' x '.join(map(str, sizes))}) and shares "
                f"train.global_batch_size={config.train.global_batch_size} evenly",
            )
        return
    for name, size in (("replicate", mesh.replicate), ("tensor", mesh.tensor)):
        if workers % size:
            raise ConfigError(f"engine.mesh.{name}", f"{size} does not divide cluster.num_workers={workers}")
    if workers % (mesh.replicate * mesh.tensor):
        product = f"replicate x tensor = {mesh.replicate} x {mesh.tensor}"
        raise ConfigError("engine.mesh.tensor", f"{product} does not divide cluster.num_workers={workers}")
    if mesh.shard != -1 and mesh.replicate * mesh.shard * mesh.tensor != workers:
        product = " x ".join(str(size) for size in (mesh.replicate, mesh.shard, mesh.tensor))
        raise ConfigError(
            "engine.mesh.shard",
            f"replicate x shard x tensor = {product} must be cluster.num_workers={workers}; -1: the rest",
        )
    batch, parts = config.train.global_batch_size, workers // mesh.tensor
    if batch % parts:
        below = max(parts, batch - batch % parts)
        sharers = f"cluster.num_workers={workers}"
        if mesh.tensor > 1:
            sharers = f"{parts} groups of workers ({sharers} / engine.mesh.tensor={mesh.tensor})"
        raise ConfigError(
            "train.global_batch_size",
            f"{batch} cannot be shared evenly by {sharers}; "
            f"the nearest that can: {below} or {batch - batch % parts + parts}",
        )


def _check_resources(config: Config) -> None:
    if unknown := [name for name, amount in config.cluster.resources_per_worker.items() if amount < 0]:
        raise ConfigError("cluster.resources_per_worker", f"{unknown[0]} must not be negative")
    gpus = config.cluster.resources_per_worker.get("GPU")
    if config.cluster.use_gpu and gpus is not None and (gpus < 1 or gpus % 1):
        text = f"a worker trains on one GPU of its own (NCCL knows no shares of one), so GPU must be 1, not {gpus:g}"
        raise ConfigError("cluster.resources_per_worker", text)
    if gpus and not config.cluster.use_gpu:
        raise ConfigError("cluster.resources_per_worker", "reserves a GPU, which cluster.use_gpu=false does not use")
    if config.engine.offload != "none" and not config.cluster.use_gpu:
        text = "is for GPUs (cluster.use_gpu=true): on CPUs weights and optimizer are in the host's memory anyway"
        raise ConfigError("engine.offload", text)


def _check_saves(config: Config) -> None:
    every = config.checkpoint
    usual = type(every)()  # what nobody has written does not stand in the way
    names = ("every_steps", "every_seconds", "every_epochs")
    others = {name: getattr(every, name) for name in names if getattr(every, name) != getattr(usual, name)}
    given = [f"checkpoint.{name}={value}" for name, value in others.items() if value is not None]
    if every.every == "auto" and given:
        text = f"auto finds out by itself when to save; beside it {' and '.join(given)} must be null"
        raise ConfigError("checkpoint.every", text)
    if every.memory_partner and every.memory_every_steps is None:
        text = "there are no copies in memory to be sent on: set checkpoint.memory_every_steps"
        raise ConfigError("checkpoint.memory_partner", text)


def _check_keep(config: Config) -> None:
    keep = config.checkpoint.keep
    if keep.best < 0:
        raise ConfigError("checkpoint.keep.best", f"must be 0 or more, not {keep.best}")
    if keep.last is None and (keep.best or keep.every_steps):
        raise ConfigError(
            "checkpoint.keep.last", "without it everything is kept, and the other rules say nothing; set it"
        )
    if keep.best or keep.metric != "held_out_loss":
        check_metric(config, keep.metric, "checkpoint.keep.metric", "loss")


def _check_faults(config: Config) -> None:
    for i, fault in enumerate(config.faults):
        most = config.worker_range[1]
        if not 0 <= fault.rank < most:
            raise ConfigError(f"faults[{i}].rank", f"must be in [0, {most}), not {fault.rank}")
