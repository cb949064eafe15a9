"""The composition root of one rank: config -> objects -> loop.train."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray import __version__, loop, models
from areal_ray.cadence import Cadence
from areal_ray.checkpoint import AsyncWriter, Catalog, CheckpointWriter, StoredState, SyncWriter
from areal_ray.config import Config, Run, dump, redact
from areal_ray.console import say, say_end
from areal_ray.control import Control, PlannedRestart
from areal_ray.data import GlobalBatches, PackedTokens, build_tokenizer, load_splits
from areal_ray.engine import FSDPEngine
from areal_ray.evaluation import Evaluator
from areal_ray.faults import Faults
from areal_ray.guard import Guard
from areal_ray.journal import LedgerJournal
from areal_ray.objectives import next_token_loss, predicted_tokens
from areal_ray.ranks import Ranks
from areal_ray.receipt import receipt
from areal_ray.recover import RecoverHandler, SavePolicy
from areal_ray.rundir import RunDir
from areal_ray.session import RaySession
from areal_ray.storage import storage_at
from areal_ray.tracking import Tracker


def main(config: Config, recipe: dict[str, Any], submission: str) -> dict[str, Any]:
    """Train one rank; Ray calls it in every worker, again after every restart.

    Args:
        config: with absolute paths.
        recipe: of the run directory's storage.
        submission: under which name requests to this job are made.

    Returns:
        step, loss (None if the last step was left out) and world_size at the end, for the driver; reason, "stop" if it
        was asked to.

    Raises:
        PlannedRestart: when the workers are to be started again, in another number or elsewhere.
    """
    try:
        return _train(config, recipe, Control(submission))
    except PlannedRestart:
        raise
    except Exception as error:
        error.add_note(traceback.format_exc())  # Ray hands exceptions on without their traceback
        raise


def _train(config: Config, recipe: dict[str, Any], control: Control) -> dict[str, Any]:
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
        run.note("attempt", say, attempt=attempt, **engine.describe(), nodes=nodes, started=round(started, 3))
    faults = Faults(config.faults, run, ranks)
    session = RaySession(faults, ranks, control)
    job = wire(config, engine, ranks, run, catalog, attempt, faults, session)
    restored = job.recover.load()
    if ranks.rank == 0:
        LedgerJournal(run, attempt, say, catalog, config.checkpoint.keep).clean_up()
        # The beginning has a line too, that of step 0.
        run.rewind(job.progress.step if restored else -1, job.progress.samples)
    _announce(run, attempt, restored, job, engine, ranks)
    loop.train(job)
    if ranks.rank == 0:
        if session.reason is not None:
            run.note("left", say, reason=session.reason, step=job.progress.step)
            if session.reason == "preempted":
                say(f"a node is being taken away: saved at step {job.progress.step}, going on without it")
        run.flush()
        say_end()
    reason = session.reason if job.progress.step < config.last_step else None  # what is finished is not interrupted
    if reason in ("resize", "preempted"):
        raise PlannedRestart(f"{reason} at step {job.progress.step}")
    loss = job.progress.metrics.get("loss")
    return {"step": job.progress.step, "loss": loss, "world_size": ranks.size, "reason": reason}


def wire(
    config: Config,
    engine: FSDPEngine,
    ranks: Ranks,
    run: RunDir,
    catalog: Catalog,
    attempt: int,
    faults: Faults,
    session: loop.RunContext,
) -> loop.Job:
    """Make the objects of one rank, each knowing only what it is given here."""
    train, here = config.train, run if ranks.rank == 0 else None  # only rank 0 writes to the run's files
    speak = say if ranks.rank == 0 else _silent
    tokenizer = build_tokenizer(config.data.tokenizer)
    sequences, held_out = load_splits(config.data, tokenizer, train.seq_len, train.global_batch_size)

    def batches(of: PackedTokens, record: Callable[[int, list[int]], None] | None = None) -> GlobalBatches:
        return GlobalBatches(
            of,
            config.run.seed,
            train.global_batch_size,
            engine.dp_rank,
            engine.dp_size,
            engine.device,
            config.run.allow_changes,
            record,
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
    record = _recorder(here) if here and config.logging.sample_ids else None
    cursor, progress = batches(sequences, record), loop.Progress()
    _same_everywhere(ranks, sequences, held_out)
    journal = LedgerJournal(here, attempt, speak, catalog, every.keep)
    guard = Guard(
        train.bad_step,
        ranks.on_first(lambda: _left_out(run)),
        # The cursor is behind the step's batch, the progress before it.
        lambda refusal: journal.refused(refusal, progress.samples, cursor.next_sample - progress.samples),
    )
    engine.accept = lambda loss, grad_norm: guard.accept(progress.step + 1, loss, grad_norm)
    state: dict[str, Stateful] = {
        "engine": engine.state,
        "data": cursor,
        "progress": progress,
        "tracker": tracker,
        "evaluate": evaluate,
        "save": save,
        "guard": guard,
    }
    info = {**engine.describe(), **_provenance(config), "data": sequences.fingerprint()}
    policy = SavePolicy(every.when_busy == "skip", every.max_failed_saves)
    recover = RecoverHandler(catalog, state, _writer(config, engine, ranks), journal, attempt, info, ranks, policy)
    return loop.Job(
        engine=engine,
        batches=cursor,
        loss_fn=faults.spoiling(next_token_loss),
        loss_weight_fn=predicted_tokens,
        guard=guard,
        go_back=lambda: _go_back(recover, progress, run, catalog, journal, ranks),
        progress=progress,
        tracker=tracker,
        evaluator=evaluator,
        evaluate=evaluate,
        recover=recover,
        save=save,
        run=session,
        last_step=config.last_step,
        total_steps=train.steps,
    )


def _same_everywhere(ranks: Ranks, *data: PackedTokens) -> None:
    """Ranks that read different files would train on something that no seed names, or wait for each other for ever."""
    prints = ranks.gather([split.fingerprint() for split in data])
    if different := [rank for rank, mine in enumerate(prints) if mine != prints[0]]:
        raise ValueError(f"ranks {different} read other data than rank 0: the files, or their Python, are not the same")


def _go_back(
    recover: RecoverHandler,
    progress: loop.Progress,
    run: RunDir,
    catalog: Catalog,
    journal: LedgerJournal,
    ranks: Ranks,
) -> bool:
    """In the middle of an attempt what `_train` does at its beginning; False if there is no checkpoint."""
    newest = ranks.on_first(lambda: next((name for *_, name in catalog.names()), None))
    restored = recover.load()
    if restored is not None and restored != newest:
        # Damage between here and there: what is saved from now on would not be newer than that, by its name.
        raise PlannedRestart(f"went back past {newest} to {restored}")
    if restored is not None:
        ranks.on_first(lambda: run.rewind(progress.step, progress.samples))
    journal.rolled_back(restored, progress.step)
    return restored is not None


def _recorder(run: RunDir) -> Callable[[int, list[int]], None]:
    def record(first: int, ids: list[int]) -> None:
        try:
            run.log_samples(first, ids)
        except OSError as error:  # it goes with the next one
            say(f"could not write the sample ids from {first} on: {error}")

    return record


def _left_out(run: RunDir) -> list[int]:
    """Steps that earlier attempts did not take: this one, which may begin before them, does not either."""
    return [event["step"] for event in run.events("bad_step") if event["action"] != "stop"]


def _writer(config: Config, engine: FSDPEngine, ranks: Ranks) -> CheckpointWriter:
    if not config.checkpoint.async_save:
        return SyncWriter(ranks)
    # No time limit of its own: a slow disk is no failure, and a dead peer closes its connections.
    background = Ranks(dist.new_group(backend="gloo", timeout=timedelta(days=1)))
    writer = AsyncWriter(ranks, background)
    engine.before_update = writer.fence
    return writer


def _announce(run: RunDir, attempt: int, restored: str | None, job: loop.Job, engine: FSDPEngine, ranks: Ranks) -> None:
    """Say on rank 0 where the run goes on, with the receipt of a restore; RankError if that contradicts itself."""

    def announce() -> None:
        parameters = sum(p.numel() for p in engine.model.parameters())
        what = (
            f"{parameters / 1e6:.1f}M parameters on {ranks.size} {engine.device.type} worker{'s' * (ranks.size != 1)}"
        )
        if restored is None:
            run.note("started", say, attempt=attempt, step=0)
            say(f"attempt {attempt}: {what}, from the beginning")
            return
        stored = StoredState(Catalog(run.storage).directory(restored))
        compared = receipt(stored.values, stored.manifest.info, job.recover.values(), job.recover.info)
        step = job.progress.step
        run.note("restored", say, attempt=attempt, step=step, checkpoint=restored, **compared.event())
        say(f"attempt {attempt}: {what}, restored {restored}, going on with step {step + 1}")
        for line in compared.text().splitlines():
            say(line)

    ranks.on_first(announce)


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
        "config": redact(dataclasses.asdict(config)),
        "seed": config.run.seed,
        "model": redact(dataclasses.asdict(config.model)),
        "hf_config": models.architecture(config.model),
        "tokenizer": config.data.tokenizer,
        "config_hash": hashlib.sha256(dump(lasting).encode()).hexdigest()[:16],
        "versions": {**versions, "transformers": transformers.__version__},
    }


def _silent(_: str) -> None:
    """What the other ranks say."""
