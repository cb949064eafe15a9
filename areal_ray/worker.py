"""The composition root of one rank: config -> objects -> loop.train."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from typing import Any

import ray
import torch
import transformers

from areal_ray import __version__, loop
from areal_ray.cadence import Cadence
from areal_ray.checkpoint import Catalog
from areal_ray.config import Config, dump
from areal_ray.console import say, say_end
from areal_ray.data import GlobalBatches, build_tokenizer, load_splits
from areal_ray.engine import FSDPEngine
from areal_ray.evaluation import Evaluator
from areal_ray.faults import Faults
from areal_ray.objectives import next_token_loss, predicted_tokens
from areal_ray.ranks import Ranks
from areal_ray.recover import RecoverHandler
from areal_ray.rundir import RunDir
from areal_ray.session import RaySession
from areal_ray.storage import storage_at
from areal_ray.tracking import Tracker


def main(config: Config) -> dict[str, Any]:
    """Train one rank; Ray calls it in every worker, again after every restart.

    Returns:
        step and loss at the end, for the driver.
    """
    started = time.time()
    engine = FSDPEngine(config)
    engine.initialize()
    ranks = Ranks()
    speak = say if ranks.rank == 0 else _silent
    run = RunDir(storage_at(config.run.storage_path).sub(config.run.name))
    catalog = Catalog(run.storage)
    attempt = ranks.on_first(lambda: run.next_attempt(catalog.last_attempt()))
    here = run if ranks.rank == 0 else None  # only rank 0 writes to the run's files
    if here:
        here.event("attempt", attempt=attempt, **engine.describe(), started=round(started, 3))

    train, held_out = load_splits(
        config.data, build_tokenizer(config.data.tokenizer), config.train.seq_len, config.train.global_batch_size
    )
    batches = _batches(config, train, ranks, engine)
    evaluator = None
    if config.eval.every_steps:
        evaluator = Evaluator(
            engine,
            lambda: _batches(config, held_out, ranks, engine),
            config.eval.batches,
            next_token_loss,
            predicted_tokens,
        )
    progress = loop.Progress()
    evaluate = Cadence(steps=config.eval.every_steps)
    every = config.checkpoint
    save = Cadence(every.every_steps, every.every_epochs, every.every_seconds, agree=ranks.agree)
    tokens_per_step = config.train.global_batch_size * config.train.seq_len
    tracker = Tracker(Cadence(config.logging.every_steps), here, speak, config.train.steps, tokens_per_step)

    def warn(checkpoint: str, reason: str) -> None:
        speak(f"passing over {checkpoint}: {reason}")
        run.event("passed_over", attempt=attempt, checkpoint=checkpoint, reason=reason)

    recover = RecoverHandler(
        catalog,
        {
            "engine": engine.state,
            "data": batches,
            "progress": progress,
            "tracker": tracker,
            "evaluate": evaluate,
            "save": save,
        },
        attempt,
        {**engine.describe(), **_provenance(config)},
        ranks,
        warn,
    )
    restored = recover.load()
    if here:
        here.rewind_metrics(progress.step)
        _announce(here, attempt, restored, progress, config, engine)
    context = RaySession(Faults(config.faults, run, ranks), here, attempt)
    loop.train(
        engine,
        batches,
        next_token_loss,
        predicted_tokens,
        progress,
        tracker,
        evaluator,
        evaluate,
        recover,
        save,
        context,
        config.last_step,
        config.train.steps,
    )
    if here:
        say_end()
    return {"step": progress.step, "loss": progress.loss, "world_size": ranks.size}


def _batches(config: Config, sequences: Any, ranks: Ranks, engine: FSDPEngine) -> GlobalBatches:
    size = config.train.global_batch_size
    return GlobalBatches(sequences, config.run.seed, size, ranks.rank, ranks.size, engine.device)


def _announce(
    run: RunDir, attempt: int, restored: str | None, progress: loop.Progress, config: Config, engine: FSDPEngine
) -> None:
    parameters = sum(p.numel() for p in engine.model.parameters())
    ranks = engine.describe()["world_size"]
    what = f"{parameters / 1e6:.1f}M parameters on {ranks} {engine.device.type} worker{'s' * (ranks != 1)}"
    if restored is None:
        run.event("started", attempt=attempt, step=0)
        say(f"attempt {attempt}: {what}, from the beginning")
    else:
        run.event("restored", attempt=attempt, step=progress.step, checkpoint=restored)
        say(f"attempt {attempt}: {what}, restored {restored}, going on with step {progress.step + 1}")


def _provenance(config: Config) -> dict[str, Any]:
    """What the manifest says about where a checkpoint comes from."""
    # Name and place, faults and the end of this invocation do not make it another experiment.
    lasting = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name="", storage_path="", recover="auto"),
        train=dataclasses.replace(config.train, stop_at=None),
        faults=[],
    )
    versions = {"areal_ray": __version__, "torch": torch.__version__, "ray": ray.__version__}
    return {
        "config_hash": hashlib.sha256(dump(lasting).encode()).hexdigest()[:16],
        "versions": {**versions, "transformers": transformers.__version__},
        "time": round(time.time(), 3),
    }


def _silent(_: str) -> None:
    """What the other ranks say."""
