"""The composition root of one rank: config -> objects -> loop.train."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
import time
import traceback
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray import __version__, loop, models
from areal_ray.cadence import Cadence
from areal_ray.checkpoint import AsyncWriter, Catalog, CheckpointWriter, SyncWriter
from areal_ray.config import Config, Run, dump, redact
from areal_ray.console import say, say_end
from areal_ray.data import GlobalBatches, PackedTokens, build_tokenizer, load_splits
from areal_ray.engine import FSDPEngine
from areal_ray.evaluation import Evaluator
from areal_ray.faults import Faults
from areal_ray.journal import LedgerJournal
from areal_ray.objectives import next_token_loss, predicted_tokens
from areal_ray.ranks import Ranks
from areal_ray.recover import RecoverHandler, SavePolicy
from areal_ray.rundir import RunDir
from areal_ray.session import RaySession
from areal_ray.storage import storage_at
from areal_ray.tracking import Tracker


def main(config: Config, recipe: dict[str, Any]) -> dict[str, Any]:
    """Train one rank; Ray calls it in every worker, again after every restart.

    Args:
        config: with absolute paths.
        recipe: of the run directory's storage.

    Returns:
        step, loss and world_size at the end, for the driver.
    """
    try:
        return _train(config, recipe)
    except Exception as error:
        error.add_note(traceback.format_exc())  # Ray hands exceptions on without their traceback
        raise


def _train(config: Config, recipe: dict[str, Any]) -> dict[str, Any]:
    started = time.time()
    run = RunDir(storage_at(**recipe))
    catalog = Catalog(run.storage)
    ranks = Ranks()
    engine = FSDPEngine(config, device="cuda" if config.cluster.use_gpu else "cpu")
    # A run that has saved goes on from a checkpoint or not at all: see RecoverHandler.load.
    engine.initialize(weights=not ranks.on_first(catalog.has_committed))
    attempt = ranks.on_first(lambda: run.next_attempt(catalog.last_attempt()))
    nodes = ranks.gather(socket.gethostname())
    if ranks.rank == 0:
        run.event("attempt", attempt=attempt, **engine.describe(), nodes=nodes, started=round(started, 3))
    job = wire(config, engine, ranks, run, catalog, attempt)
    restored = job.recover.load()
    if ranks.rank == 0:
        LedgerJournal(run, attempt, say, catalog, config.checkpoint.keep).clean_up()
        run.rewind_metrics(job.progress.step if restored else -1)  # the beginning has a line too, that of step 0
        _announce(run, attempt, restored, job, engine)
    loop.train(job)
    if ranks.rank == 0:
        run.flush()
        say_end()
    return {"step": job.progress.step, "loss": job.progress.metrics["loss"], "world_size": ranks.size}


def wire(config: Config, engine: FSDPEngine, ranks: Ranks, run: RunDir, catalog: Catalog, attempt: int) -> loop.Job:
    """Make the objects of one rank, each knowing only what it is given here."""
    train, here = config.train, run if ranks.rank == 0 else None  # only rank 0 writes to the run's files
    speak = say if ranks.rank == 0 else _silent
    tokenizer = build_tokenizer(config.data.tokenizer)
    sequences, held_out = load_splits(config.data, tokenizer, train.seq_len, train.global_batch_size)

    def batches(of: PackedTokens) -> GlobalBatches:
        return GlobalBatches(
            of, config.run.seed, train.global_batch_size, engine.dp_rank, engine.dp_size, engine.device
        )

    every = config.checkpoint
    save = Cadence(every.every_steps, every.every_epochs, every.every_seconds, agree=ranks.agree)
    evaluate = Cadence(config.eval.every_steps)
    evaluator = None
    if config.eval.every_steps:
        evaluator = Evaluator(engine, lambda: batches(held_out), config.eval.batches, next_token_loss, predicted_tokens)
    tracker = Tracker(
        Cadence(config.logging.every_steps), here, speak, train.steps, train.global_batch_size * train.seq_len
    )
    cursor, progress = batches(sequences), loop.Progress()
    _same_everywhere(ranks, sequences, held_out)
    state: dict[str, Stateful] = {
        "engine": engine.state,
        "data": cursor,
        "progress": progress,
        "tracker": tracker,
        "evaluate": evaluate,
        "save": save,
    }
    info = {**engine.describe(), **_provenance(config), "data": sequences.fingerprint()}
    return loop.Job(
        engine=engine,
        batches=cursor,
        loss_fn=next_token_loss,
        loss_weight_fn=predicted_tokens,
        progress=progress,
        tracker=tracker,
        evaluator=evaluator,
        evaluate=evaluate,
        recover=RecoverHandler(
            catalog,
            state,
            _writer(config, engine, ranks),
            LedgerJournal(here, attempt, speak, catalog, config.checkpoint.keep),
            attempt,
            info,
            ranks,
            SavePolicy(every.when_busy == "skip", every.max_failed_saves),
        ),
        save=save,
        run=RaySession(Faults(config.faults, run, ranks)),
        last_step=config.last_step,
        total_steps=train.steps,
    )


def _same_everywhere(ranks: Ranks, *data: PackedTokens) -> None:
    """Ranks that read different files would train on something that no seed names, or wait for each other for ever."""
    prints = ranks.gather([split.fingerprint() for split in data])
    if different := [rank for rank, mine in enumerate(prints) if mine != prints[0]]:
        raise ValueError(f"ranks {different} read other data than rank 0: the files, or their Python, are not the same")


def _writer(config: Config, engine: FSDPEngine, ranks: Ranks) -> CheckpointWriter:
    if not config.checkpoint.async_save:
        return SyncWriter(ranks)
    # No time limit of its own: a slow disk is no failure, and a dead peer closes its connections.
    background = Ranks(dist.new_group(backend="gloo", timeout=timedelta(days=1)))
    writer = AsyncWriter(ranks, background)
    engine.before_update = writer.fence
    return writer


def _announce(run: RunDir, attempt: int, restored: str | None, job: loop.Job, engine: FSDPEngine) -> None:
    parameters = sum(p.numel() for p in engine.model.parameters())
    ranks = engine.describe()["world_size"]
    what = f"{parameters / 1e6:.1f}M parameters on {ranks} {engine.device.type} worker{'s' * (ranks != 1)}"
    if restored is None:
        run.event("started", attempt=attempt, step=0)
        say(f"attempt {attempt}: {what}, from the beginning")
    else:
        step = job.progress.step
        run.event("restored", attempt=attempt, step=step, checkpoint=restored)
        say(f"attempt {attempt}: {what}, restored {restored}, going on with step {step + 1}")


def _provenance(config: Config) -> dict[str, Any]:
    """What the manifest says about where a checkpoint comes from."""
    # Name and place, faults and the end of this invocation do not make it another experiment.
    lasting = dataclasses.replace(
        config,
        run=Run(seed=config.run.seed),
        train=dataclasses.replace(config.train, stop_at=None),
        faults=[],
    )
    versions = {"areal_ray": __version__, "torch": torch.__version__, "ray": ray.__version__}
    return {
        "seed": config.run.seed,
        "model": redact(dataclasses.asdict(config.model)),
        "hf_config": models.architecture(config.model),
        "tokenizer": config.data.tokenizer,
        "config_hash": hashlib.sha256(dump(lasting).encode()).hexdigest()[:16],
        "versions": {**versions, "transformers": transformers.__version__},
    }


def _silent(_: str) -> None:
    """What the other ranks say."""
