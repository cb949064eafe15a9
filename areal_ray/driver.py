"""The driver: check everything, hand the job to Ray Train, say what came of it."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig

from areal_ray import data, failures, models, snapshot, worker
from areal_ray.checkpoint import Catalog, hf
from areal_ray.cluster import cluster, resources
from areal_ray.config import Config, ConfigError, dump, redact, redact_override
from areal_ray.console import Console
from areal_ray.control import Control
from areal_ray.goodput import goodput
from areal_ray.policies import StoppedWhileWaiting, Trainer
from areal_ray.rundir import RunDir
from areal_ray.storage import LocalStorage, Storage, storage_at
from areal_ray.storage_s3 import filesystem


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
    try:
        run.storage.ensure()
        run.write_config(_record(config, overrides))
    except OSError as error:
        raise ConfigError("run.storage_path", str(error)) from None
    print(f"run directory: {run.storage.location}", flush=True)
    with Console() as console, cluster(config):
        submission = secrets.token_hex(8)
        run.note("submitted", print, last_step=config.last_step, submission=submission)
        snapshot.rebuild(run.storage)
        try:
            outcome = _trainer(config, run.storage, submission).fit().return_value
        except TrainingFailedError as error:
            if isinstance(getattr(error, "controller_failure", None), StoppedWhileWaiting):
                return _interrupted(run)
            cause = failures.cause_of(error)
            console.wait_for_end(timeout_s=1.0)
            failures.show(cause, run)
            _close(run, "failed", {}, cause=cause.kind, error=cause.message[:500])
            return 1
        except (KeyboardInterrupt, SystemExit):  # Ray Train makes the latter of Ctrl-C once it has ended the workers
            return _interrupted(run)
        finally:
            Control(submission).close()
        assert outcome is not None
        console.wait_for_end()
        if outcome["reason"] == "stop":
            return _interrupted(run)
        status = "finished" if outcome["step"] == config.train.steps else "stopped"
        _summary(run, _close(run, status, outcome, step=outcome["step"]))
    return 0


def _close(run: RunDir, status: str, outcome: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Write the last event and result.json; the result."""
    run.note(status, print, **fields)
    result: dict[str, Any] = {"status": status, "step": 0, "loss": None, "restarts": 0, "checkpoint": None, **outcome}
    try:
        result = _result(run, status, outcome)
        run.write_result(result)
    except OSError as error:
        print(f"could not write result.json: {error}", flush=True)
    return result


def _interrupted(run: RunDir) -> int:
    newest = Catalog(run.storage).newest()
    _close(run, "interrupted", {})
    print(f"interrupted; the same command goes on from {newest.name if newest else 'the beginning'}", flush=True)
    return 130


def prepare(config: Config) -> tuple[RunDir, Config]:
    """Check what can be checked without a cluster, and fix paths.

    Returns:
        The run directory, and the config with an absolute storage path.

    Raises:
        ConfigError: if the run could not start, or must not touch what it would find.
    """
    try:
        storage = storage_at(config.run.storage_path, asdict(config.run.s3))
    except ValueError as error:
        raise ConfigError("run.storage_path", str(error)) from None
    _check_writable(config, storage)
    config = replace(config, run=replace(config.run, storage_path=storage.location))
    tokenizer = data.build_tokenizer(config.data.tokenizer)
    models.check_model(config.model, tokenizer.vocab_size)
    if config.engine.mesh.tensor > 1:
        models.tensor_plan(models.build_model(config.model), config.engine.mesh.tensor)
    if config.model.path:
        _check_weights(config)
    sequences, _ = data.load_splits(config.data, tokenizer, config.train.seq_len, config.train.global_batch_size)
    run = RunDir(storage.sub(config.run.name))
    has_checkpoint = any(entry.manifest for entry in Catalog(run.storage).entries())
    if config.run.recover == "fresh" and run.exists():
        raise ConfigError(
            "run.recover", f"`fresh`, but {run.storage.location} holds a run already; choose another run.name"
        )
    if config.run.recover == "resume" and not has_checkpoint:
        raise ConfigError("run.recover", f"`resume`, but {run.storage.location} holds no checkpoint")
    newest = Catalog(run.storage).newest()
    if newest is not None and newest.manifest is not None:
        _check_continues(newest.manifest.info, config, sequences.fingerprint())
    return run, config


def _check_weights(config: Config) -> None:
    assert config.model.path
    try:
        path = hf.resolve(config.model.path)
        hf.stored_names(path, models.build_model(config.model), hf.shapes(path))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError("model.path", str(error)) from None


def _check_continues(saved: dict[str, Any], config: Config, fingerprint: str) -> None:
    """Compare what a checkpoint says of its run with what is asked for, where nobody could go on with a difference."""
    if not {"model", "seed", "data"} <= set(saved):
        return  # an engine's own save, put here by hand; the workers compare the state itself
    before, now = saved["model"], redact(asdict(config.model))
    old, new = before["config"], now["config"]
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    values = ", ".join(f"{key} was {old.get(key)} and is {new.get(key)}" for key in changed[:4])
    path = config.model.path
    other_architecture = bool(path) and not models.same_architecture(saved.get("hf_config") or {}, config.model)
    found = {
        "model.config": f"this run's checkpoints are of another model: {values}" if changed else "",
        "model.path": "this run's checkpoints are of another architecture" if other_architecture else "",
        "model.factory": f"this run's checkpoints were made with {before['factory']}"
        if before["factory"] != now["factory"]
        else "",
        "run.seed": f"this run's data are in the order of seed {saved['seed']}"
        if saved["seed"] != config.run.seed
        else "",
        "data": "files, tokenizer or train.seq_len are not those that this run has trained on"
        if saved["data"] != fingerprint
        else "",
    }
    for key, problem in found.items():
        if problem and key not in config.run.allow_changes:
            hint = f"; choose another run.name, or go back, or say run.allow_changes='[{key}]'"
            raise ConfigError(key, problem + hint)


def _trainer(config: Config, storage: Storage, submission: str) -> Trainer:
    recipe = storage.recipe
    root, files = config.run.storage_path, None
    if "s3" in recipe:
        root, files = root.removeprefix("s3://"), filesystem(recipe["s3"])

    def work() -> dict[str, Any]:
        # Not as train_loop_config, which Ray shows on its dashboard, with credentials if there are any.
        return worker.main(config, recipe, submission)

    wanted = config.cluster
    backend = "cpu:gloo,cuda:nccl" if wanted.use_gpu else "gloo"
    return Trainer(
        work,
        torch_config=TorchConfig(backend=backend, timeout_s=int(wanted.collective_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=config.worker_range, use_gpu=wanted.use_gpu, resources_per_worker=resources(config)
        ),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=root,
            storage_filesystem=files,
            failure_config=FailureConfig(max_failures=wanted.max_failures),
            checkpoint_config=CheckpointConfig(),
            callbacks=[failures.Reporter(recipe)],
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
        sizes=config.usable_sizes,
        control=Control(submission),
        recipe=recipe,
    )


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


def _record(config: Config, overrides: Sequence[str]) -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    head = [
        f"# git revision: {git.stdout.strip() or 'unknown'}",
        *(f"# override: {text}" for text in map(redact_override, overrides)),
    ]
    return "\n".join(head) + "\n" + dump(config)


def _result(run: RunDir, status: str, outcome: dict[str, Any]) -> dict[str, Any]:
    newest = Catalog(run.storage).newest()
    attempts = run.events("attempt")
    planned = [event for event in run.events("left") if event["reason"] != "stop"]
    return {
        "status": status,
        "step": outcome.get("step", newest.step if newest else 0),
        "loss": outcome.get("loss"),
        "world_size": outcome.get("world_size", attempts[-1]["world_size"] if attempts else None),
        "restarts": max(0, len(attempts) - len(run.events("submitted")) - len(planned)),
        "checkpoint": newest.name if newest else None,
        "goodput": goodput(run),
    }


def _summary(run: RunDir, result: dict[str, Any]) -> None:
    n = result["restarts"]
    loss = "" if result["loss"] is None else f"loss {result['loss']:.4f}, "  # None: the last step was left out
    print(f"{result['status']}: step {result['step']}, {loss}{n} restart{'s' * (n != 1)}")
    held_out = [line for line in run.metrics() if "held_out_loss" in line]
    if len(held_out) > 1:
        first, last = held_out[0], held_out[-1]
        print(
            f"held-out loss: {first['held_out_loss']:.4f} at step {first['step']}, {last['held_out_loss']:.4f} at step "
            f"{last['step']} ({last['held_out_loss'] / first['held_out_loss']:.0%})"
        )
    print(f"checkpoint: {run.storage.location}/{result['checkpoint']}", flush=True)
