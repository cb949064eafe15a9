"""The driver: check everything, hand the job to Ray Train, say what came of it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from areal_ray import data, failures, models, worker
from areal_ray.checkpoint import Catalog
from areal_ray.config import Config, ConfigError, dump
from areal_ray.console import Console
from areal_ray.rundir import RunDir
from areal_ray.storage import storage_at


def train(config: Config, overrides: Sequence[str] = ()) -> int:
    """Run an experiment to its end.

    Args:
        config: as loaded.
        overrides: what was typed beside the file, for the record.

    Returns:
        The exit status: 0 when the run reached its last step, 1 when training failed.

    Raises:
        ConfigError: before anything is started.
    """
    run, config = prepare(config)
    done = Catalog(run.storage).newest()
    if done is not None and done.step >= config.last_step:
        print(
            f"{config.run.name} has finished step {done.step} already ({run.storage.location}/{done.name}).\n"
            "To go on: a later train.stop_at or more train.steps. To begin anew: another run.name."
        )
        return 0
    run.storage.ensure()
    run.write_config(_record(config, overrides))
    print(f"run directory: {run.storage.location}", flush=True)
    connect(config)
    started = time.time()
    run.event("submitted", last_step=config.last_step)
    with Console() as console:
        try:
            outcome = _trainer(config).fit().return_value
        except TrainingFailedError as error:
            run.event("failed", error=str(failures.root_cause(error).exception))
            run.write_result(_result(run, config, "failed", started, {}))
            failures.show(error, run)
            return 1
        console.wait_for_end()
    assert outcome is not None
    status = "finished" if outcome["step"] == config.train.steps else "stopped"
    run.event(status, step=outcome["step"])
    result = _result(run, config, status, started, outcome)
    run.write_result(result)
    _summary(result, run)
    return 0


def prepare(config: Config) -> tuple[RunDir, Config]:
    """Check what can be checked without a cluster, and fix paths.

    Returns:
        The run directory, and the config with an absolute storage path.

    Raises:
        ConfigError: if the run could not start, or must not touch what it would find.
    """
    try:
        storage = storage_at(config.run.storage_path)
    except ValueError as error:
        raise ConfigError("run.storage_path", str(error)) from None
    _check_writable(config, storage.location)
    config = _with_storage_path(config, storage.location)
    tokenizer = data.build_tokenizer(config.data.tokenizer)
    models.check_model(config.model, tokenizer.vocab_size)
    data.load_splits(config.data, tokenizer, config.train.seq_len, config.train.global_batch_size)
    run = RunDir(storage.sub(config.run.name))
    has_checkpoint = any(entry.manifest for entry in Catalog(run.storage).entries())
    if config.run.recover == "fresh" and run.exists():
        raise ConfigError("run.recover", f"`fresh`, but {run.storage.location} holds a run already; choose another run.name")
    if config.run.recover == "resume" and not has_checkpoint:
        raise ConfigError("run.recover", f"`resume`, but {run.storage.location} holds no checkpoint")
    return run, config


def connect(config: Config) -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it), or start one on this machine."""
    if ray.is_initialized():
        return
    # The restarts' log lines of Ray's own would bury ours; they stay in Ray's log files.
    options: dict[str, Any] = {"logging_level": logging.ERROR, "runtime_env": _runtime_env()}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
        return
    needed = config.cluster.num_workers * _resources(config).get("CPU", 0)
    cores = os.cpu_count() or 1
    if needed > cores:
        print(f"{config.cluster.num_workers} workers share this machine's {cores} CPU cores")
    # Fewer cores than workers is slow, not wrong: tell Ray what it needs to hear to place them.
    ray.init(num_cpus=max(cores, int(-(-needed // 1))), include_dashboard=False, **options)


def _trainer(config: Config) -> TorchTrainer:
    cluster = config.cluster
    backend = "cpu:gloo,cuda:nccl" if cluster.use_gpu else "gloo"
    return TorchTrainer(
        worker.main,
        train_loop_config=config,
        torch_config=TorchConfig(backend=backend, timeout_s=int(cluster.collective_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=_resources(config)
        ),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=config.run.storage_path,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(),
            callbacks=[failures.Reporter(config.run.storage_path, config.run.name)],
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _resources(config: Config) -> dict[str, float]:
    return {"CPU": 1, **({"GPU": 1} if config.cluster.use_gpu else {}), **config.cluster.resources_per_worker}


def _runtime_env() -> dict[str, Any]:
    quiet = {
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it shows every line of a worker twice
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",  # report() waits for all ranks, by default for ever
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {"env_vars": {name: os.environ.get(name, value) for name, value in quiet.items()}}


def _check_writable(config: Config, location: str) -> None:
    path = Path(location)
    if "runtime_resources/working_dir_files" in os.getcwd() and not Path(config.run.storage_path).expanduser().is_absolute():
        raise ConfigError("run.storage_path", "is relative, but a submitted job runs in a folder that Ray deletes; make it absolute")
    while not path.exists():
        path = path.parent
    if not (path.is_dir() and os.access(path, os.W_OK)):
        raise ConfigError("run.storage_path", f"cannot write below {path}")


def _with_storage_path(config: Config, path: str) -> Config:
    from dataclasses import replace

    return replace(config, run=replace(config.run, storage_path=path))


def _record(config: Config, overrides: Sequence[str]) -> str:
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    head = [f"# git revision: {git.stdout.strip() or 'unknown'}", *(f"# override: {override}" for override in overrides)]
    return "\n".join(head) + "\n" + dump(config)


def _result(run: RunDir, config: Config, status: str, started: float, outcome: dict[str, Any]) -> dict[str, Any]:
    newest = Catalog(run.storage).newest()
    metrics = run.metrics()
    productive = sum(
        line["step_time_s"] * config.logging.every_steps for line in metrics if "step_time_s" in line
    )
    attempts = run.events("attempt")
    wall = sum(
        e["time"] for e in run.events() if e["event"] in ("finished", "stopped", "failed")
    ) - sum(e["time"] for e in run.events("submitted"))
    del started
    return {
        "status": status,
        "step": outcome.get("step", newest.step if newest else 0),
        "loss": outcome.get("loss"),
        "world_size": outcome.get("world_size", attempts[-1]["world_size"] if attempts else None),
        "restarts": len(run.events("failure")),
        "checkpoint": newest.name if newest else None,
        "goodput": {"wall_s": round(wall, 1), "steps_s": round(productive, 1), "share": round(productive / max(wall, 1e-9), 3)},
    }


def _summary(result: dict[str, Any], run: RunDir) -> None:
    held_out = [line for line in run.metrics() if "held_out_loss" in line]
    print(f"{result['status']}: step {result['step']}, loss {result['loss']:.4f}, {result['restarts']} restarts")
    if len(held_out) > 1:
        first, last = held_out[0], held_out[-1]
        print(
            f"held-out loss: {first['held_out_loss']:.4f} at step {first['step']}, {last['held_out_loss']:.4f} at step "
            f"{last['step']} ({last['held_out_loss'] / first['held_out_loss']:.0%})"
        )
    print(f"checkpoint: {run.storage.location}/{result['checkpoint']}")
    sys.stdout.flush()
