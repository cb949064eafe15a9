"""The composition root of one rank: config to objects."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint import AsyncWriter, Catalog, CheckpointWriter, MemoryCopies, SyncWriter
from areal_ray.cluster.requests import PlannedRestart
from areal_ray.config import Config
from areal_ray.data import GlobalBatches, TokenDataset, build_tokenizer, load_splits
from areal_ray.distributed import Ranks
from areal_ray.engine import Objective, TrainEngine
from areal_ray.run import JobContext, RunDir
from areal_ray.train import loop
from areal_ray.train.bad_steps import BadStepPolicy
from areal_ray.train.cadence import Cadence
from areal_ray.train.evaluation import Evaluator
from areal_ray.train.journal import Journal
from areal_ray.train.recovery import RecoverHandler, SavePolicy
from areal_ray.train.restore import Restore
from areal_ray.train.sinks import Console, MetricsFile, MetricsSink, build_tracker
from areal_ray.train.tracking import StepMetrics
from areal_ray.worker.provenance import provenance

MakeRecover = Callable[[Mapping[str, Stateful]], RecoverHandler]


@dataclass(frozen=True)
class Start:
    """One start of the workers, as seen by one rank.

    Args:
        attempt: its number.
        run: the run directory.
        ranks: all ranks.
        say: prints a line for the user; silent on all ranks but the first.
        catalog: the run's checkpoints.
    """

    attempt: int
    run: RunDir
    ranks: Ranks
    say: Callable[[str], None]
    catalog: Catalog

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes to the run's files."""
        return self.ranks.rank == 0


def build_job(
    config: Config,
    start: Start,
    engine: TrainEngine,
    data: tuple[TokenDataset, TokenDataset],
    objective: Objective,
    context: loop.RunContext,
    make_recover: MakeRecover,
    journal: Journal,
) -> tuple[loop.Job, Restore]:
    """Make the objects of one rank, each knowing only what it is given here; and what restores them.

    Args:
        config: checked.
        start: of the workers.
        engine: initialised.
        data: to train on, and held out.
        objective: what is minimised.
        context: the job around the loop.
        make_recover: of everything that makes the run resumable, by name.
        journal: told of bad steps.
    """
    train, every, run = config.train, config.checkpoint, start.run

    def batches(of: TokenDataset, record: Callable[[int, list[int]], None] | None = None) -> GlobalBatches:
        sizes = train.global_batch_size, engine.dp_rank, engine.dp_size
        return GlobalBatches(of, config.run.seed, *sizes, engine.device, config.run.allow_changes, record)

    sequences, held_out = data
    record = _recorder(run, start.say) if start.first and config.logging.sample_ids else None
    cursor, progress = batches(sequences, record), loop.Progress()
    evaluator = None
    if config.eval.every_steps:
        args = engine, lambda: batches(held_out), config.eval.batches, objective, lambda: context.enter("evaluate")
        evaluator = Evaluator(*args)
    log = Cadence(config.logging.every_steps)
    metrics = StepMetrics(log, _sinks(config, start), train.steps, train.global_batch_size * train.seq_len)
    save = Cadence(every.every_steps, every.every_epochs, every.every_seconds, agree=start.ranks.agree)
    copy = Cadence(every.memory_every_steps)
    evaluate = Cadence(config.eval.every_steps)
    bad_steps = BadStepPolicy(
        train.bad_step,
        start.ranks.on_rank_zero(lambda: _left_out(run)),
        # The cursor is behind the step's batch, the progress before it.
        lambda refusal: journal.refused(refusal, progress.samples, cursor.next_sample - progress.samples),
    )
    state: dict[str, Stateful] = {
        "engine": engine.state,
        "data": cursor,
        "progress": progress,
        "tracker": metrics,
        "evaluate": evaluate,
        "save": save,
        "guard": bad_steps,
    }
    recover = make_recover(state)
    restore = Restore(run, start.attempt, recover, progress, metrics, start.ranks, start.say, PlannedRestart)

    def roll_back() -> bool:
        restored = restore.roll_back()
        if restored:
            copy.fired(progress.step, 0)  # no part of the state, as copies come and go with the attempt
        return restored

    job = loop.Job(
        engine=engine,
        batches=cursor,
        objective=objective,
        bad_steps=bad_steps,
        roll_back=roll_back,
        progress=progress,
        metrics=metrics,
        evaluator=evaluator,
        evaluate=evaluate,
        recover=recover,
        save=save,
        copy=copy,
        run=context,
        last_step=config.last_step,
        total_steps=train.steps,
    )
    return job, restore


def load_data(config: Config, ranks: Ranks) -> tuple[TokenDataset, TokenDataset]:
    """The data to train on and the held-out data, the same on all ranks. A collective.

    Raises:
        ValueError: if ranks read different files: they would train on something that no seed names, or wait for each
            other for ever.
    """
    train = config.train
    tokenizer = build_tokenizer(config.data.tokenizer)
    data = load_splits(config.data, tokenizer, train.seq_len, train.global_batch_size)
    prints = ranks.gather([split.fingerprint for split in data])
    if different := [rank for rank, mine in enumerate(prints) if mine != prints[0]]:
        raise ValueError(f"ranks {different} read other data than rank 0: the files, or their Python, are not the same")
    return data


def recover_handler(
    config: Config,
    start: Start,
    state: Mapping[str, Stateful],
    info: Mapping[str, Any],
    journal: Journal,
    memory: MemoryCopies | None,
) -> RecoverHandler:
    """The recover handler of a run: saves and restores its state as checkpoints."""
    every = config.checkpoint
    policy = SavePolicy(every.when_busy == "skip", every.max_failed_saves)
    described = {**info, **provenance(config)}
    writer = _writer(config, start.ranks)
    return RecoverHandler(start.catalog, state, writer, journal, start.attempt, described, start.ranks, policy, memory)


def memory_copies(config: Config, ranks: Ranks, context: JobContext, say: Callable[[str], None]) -> MemoryCopies | None:
    """Copies between checkpoints, in every rank; None if there are to be none."""
    if config.checkpoint.memory_every_steps is None:
        return None
    # Steps that are not computed again must have left their metrics.
    durable = context.run.flush if ranks.rank == 0 else lambda: None
    return MemoryCopies(context.submission, ranks, int(os.environ["RAY_RAYLET_PID"]), say, durable)


def _sinks(config: Config, start: Start) -> list[MetricsSink]:
    if not start.first:
        return []
    own = [build_tracker(each, f"trackers[{i}]", start.say) for i, each in enumerate(config.trackers)]
    return [Console(start.say, config.train.steps), MetricsFile(start.run, start.say), *own]


def _recorder(run: RunDir, say: Callable[[str], None]) -> Callable[[int, list[int]], None]:
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
