"""The composition root of one rank: config to objects."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint import AsyncWriter, Catalog, CheckpointWriter, MemoryCopies, SyncWriter
from areal_ray.cluster.console import say
from areal_ray.cluster.requests import PlannedRestart
from areal_ray.config import Config
from areal_ray.data import GlobalBatches, PackedTokens, build_tokenizer, load_splits
from areal_ray.distributed import Ranks
from areal_ray.engine import FSDPEngine
from areal_ray.engine.objectives import next_token_loss, predicted_tokens
from areal_ray.run import RunDir
from areal_ray.run.job_context import JobContext
from areal_ray.train import loop
from areal_ray.train.bad_steps import BadStepPolicy
from areal_ray.train.cadence import Cadence
from areal_ray.train.evaluation import Evaluator
from areal_ray.train.faults import Faults
from areal_ray.train.journal import Journal, retention
from areal_ray.train.recovery import RecoverHandler, SavePolicy
from areal_ray.train.tracking import Tracker
from areal_ray.worker.provenance import provenance


def wire(
    config: Config,
    engine: FSDPEngine,
    ranks: Ranks,
    run: RunDir,
    catalog: Catalog,
    attempt: int,
    faults: Faults,
    session: loop.RunContext,
    memory: MemoryCopies | None,
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
    remember = Cadence(every.memory_every_steps)
    evaluate = Cadence(config.eval.every_steps)
    evaluator = None
    if config.eval.every_steps:
        evaluator = Evaluator(
            engine,
            lambda: batches(held_out),
            config.eval.batches,
            next_token_loss,
            predicted_tokens,
            lambda: session.enter("evaluate"),
        )
    tracker = Tracker(
        Cadence(config.logging.every_steps), here, speak, train.steps, train.global_batch_size * train.seq_len
    )
    record = _recorder(here) if here and config.logging.sample_ids else None
    cursor, progress = batches(sequences, record), loop.Progress()
    _same_everywhere(ranks, sequences, held_out)
    journal = Journal(here, attempt, speak, retention(run, attempt, speak, catalog, every.keep))
    guard = BadStepPolicy(
        train.bad_step,
        ranks.on_rank_zero(lambda: _left_out(run)),
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
    info = {**engine.describe(), **provenance(config), "data": sequences.fingerprint()}
    policy = SavePolicy(every.when_busy == "skip", every.max_failed_saves)
    recover = RecoverHandler(catalog, state, _writer(config, ranks), journal, attempt, info, ranks, policy, memory)
    engine.before_update = recover.wait_for_copy
    return loop.Job(
        engine=engine,
        batches=cursor,
        loss_fn=faults.spoiling(next_token_loss),
        loss_weight_fn=predicted_tokens,
        guard=guard,
        go_back=lambda: _go_back(recover, progress, remember, run, catalog, journal, ranks),
        progress=progress,
        tracker=tracker,
        evaluator=evaluator,
        evaluate=evaluate,
        recover=recover,
        save=save,
        remember=remember,
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
    remember: Cadence,
    run: RunDir,
    catalog: Catalog,
    journal: Journal,
    ranks: Ranks,
) -> bool:
    """In the middle of an attempt what `_train` does at its beginning; False if there is no checkpoint."""
    newest = ranks.on_rank_zero(lambda: next((name for *_, name in catalog.names()), None))
    restored = recover.load()
    if restored is not None and restored != newest:
        # Damage between here and there: what is saved from now on would not be newer than that, by its name.
        raise PlannedRestart(f"went back past {newest} to {restored}")
    if restored is not None:
        ranks.on_rank_zero(lambda: run.rewind(progress.step, progress.samples))
        remember.fired(progress.step, 0)  # no part of the state, as copies come and go with the attempt
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
    bad = [event["step"] for event in run.events("bad_step") if event["action"] != "stop"]
    return bad + [event["step"] for event in run.events("poison_step")]


def _writer(config: Config, ranks: Ranks) -> CheckpointWriter:
    if not config.checkpoint.async_save:
        return SyncWriter(ranks)
    # No time limit of its own: a slow disk is no failure, and a dead peer closes its connections.
    background = Ranks(dist.new_group(backend="gloo", timeout=timedelta(days=1)))
    return AsyncWriter(ranks, background)


def memory_copies(config: Config, ranks: Ranks, context: JobContext) -> MemoryCopies | None:
    if config.checkpoint.memory_every_steps is None:
        return None
    # Steps that are not computed again must have left their metrics.
    durable = context.run.flush if ranks.rank == 0 else lambda: None
    return MemoryCopies(context.submission, ranks, int(os.environ["RAY_RAYLET_PID"]), say, durable)


def _silent(_: str) -> None:
    """What the other ranks say."""
