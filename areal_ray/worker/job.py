"""The job of one rank: the objects of the training loop, and those that restore them. Without Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.config import Config, ConfigError, plugin
from areal_ray.data import GlobalBatches, TokenDataset, build_tokenizer
from areal_ray.data.corpus.corpus import Corpus, TokenSource
from areal_ray.data.splits import open_sets, open_source, open_splits, own_splits
from areal_ray.distributed import Ranks
from areal_ray.distributed.peak import peak_bytes, peak_tflops
from areal_ray.engine import Objective, TrainEngine
from areal_ray.run import RunDir
from areal_ray.storage import storage_at
from areal_ray.train import loop
from areal_ray.train.bad_steps import BadStepPolicy
from areal_ray.train.cadence import AlsoEvery, AutoCadence, Cadence
from areal_ray.train.early_stopping import NeverStops, Stopping
from areal_ray.train.journal import Journal
from areal_ray.train.recovery import RecoverHandler
from areal_ray.train.restore import Restore
from areal_ray.train.sinks import Console, MetricsFile, MetricsSink
from areal_ray.train.trackers import build_tracker
from areal_ray.train.tracking import StepMetrics
from areal_ray.train.worker_numbers import CountedTime, WorkerNumbers
from areal_ray.worker.evaluations import build_evaluations, early_stopping
from areal_ray.worker.start import Start

_MakeRecover = Callable[[Mapping[str, Stateful]], RecoverHandler]


@dataclass(frozen=True)
class Data:
    """Rows of a run: to train on, held out, and of the evaluation sets by their names."""

    train: TokenDataset
    held_out: TokenDataset
    sets: Mapping[str, TokenDataset] = field(default_factory=dict)


def build_job(
    config: Config,
    start: Start,
    engine: TrainEngine,
    data: Data,
    objective: Objective,
    context: loop.RunContext,
    make_recover: _MakeRecover,
    journal: Journal,
    planned_restart: Callable[[str], Exception],
    auto: AutoCadence | None = None,
    operations: float | None = None,
    beside: Sequence[MetricsSink] = (),
    pulse: Callable[[int], None] = lambda _: None,
) -> tuple[loop.Job, Restore]:
    """Make the objects of one rank, each knowing only what it is given here; and what restores them.

    Args:
        config: checked.
        start: of the workers.
        engine: initialised.
        data: to train and evaluate on.
        objective: what is minimised.
        context: the job around the loop.
        make_recover: of everything that makes the run resumable, by name.
        journal: told of bad steps.
        planned_restart: exception that has the workers started again, see `Restore`.
        auto: when to save, where checkpoint.every is auto; None: as the other keys say.
        operations: of the model for a position, see `models.operations`; None: not known.
        beside: places for metrics on this rank, beside those that the config names.
        pulse: hears of every step that has ended.

    Raises:
        ConfigError: if the optimizer cannot do what train.bad_step.lag asks for.
    """
    train, every, run = config.train, config.checkpoint, start.run
    if train.bad_step.lag and not engine.skips_on_device:
        text = (
            f"1 needs an optimizer that can be told on the device to change nothing (torch's fused ones; "
            f"_step_supports_amp_scaling), and {config.optim.name} makes one that cannot: 0 works with every optimizer"
        )
        raise ConfigError("train.bad_step.lag", text)

    def batches(of: TokenDataset, record: Callable[[int, list[int]], None] | None = None) -> GlobalBatches:
        sizes = train.global_batch_size, engine.dp_rank, engine.dp_size
        change, ahead = config.run.allow_changes, config.data.prefetch_batches
        return GlobalBatches(of, config.run.seed, *sizes, engine.device, change, record, ahead)

    record = start.record_samples if start.first and config.logging.sample_ids else None
    cursor, progress = batches(data.train, record), loop.Progress()
    evaluate = Cadence(config.eval.every_steps)

    def wait() -> None:
        recover.wait_for_copy()

    rows = data.held_out, data.sets
    evaluations = build_evaluations(config, start, engine, objective, *rows, batches, evaluate, context, wait)
    log = Cadence(config.logging.every_steps)
    ranks, device_s = start.ranks, _device_seconds(config, operations)
    numbers = WorkerNumbers(ranks.gather_numbers, engine.dp_size, cursor, lambda: peak_bytes(engine.device), device_s)
    metrics = StepMetrics(
        log,
        [*_sinks(config, start), *beside],
        train.steps,
        train.global_batch_size,
        train.global_batch_size * train.seq_len,
        lambda: cursor.seconds,
        cursor.metrics,
        numbers,
        CountedTime(run) if start.first else None,
        pulse,
    )
    save = auto or Cadence(every.every_steps, every.every_epochs, every.every_seconds, agree=start.ranks.agree)
    if config.export is not None and config.export.every_steps is not None:
        save = AlsoEvery(save, config.export.every_steps)  # exports are made from checkpoints
    copy = Cadence(every.memory_every_steps)
    bad_steps = BadStepPolicy(
        train.bad_step,
        start.ranks.on_rank_zero(start.left_out_steps),
        lambda refusal: journal.refused(refusal, refusal.samples.start, len(refusal.samples)),
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
    stopping: Stopping = NeverStops()
    if config.eval.early_stopping is not None:
        state["early_stopping"] = stopping = early_stopping(config.eval.early_stopping, start)
    recover: RecoverHandler = make_recover(state)
    restore = Restore(run, start.attempt, recover, progress, metrics, start.ranks, start.say, planned_restart)

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
        evaluations=evaluations,
        stopping=stopping,
        recover=recover,
        save=save,
        copy=copy,
        run=context,
        last_step=config.last_step,
        total_steps=train.steps,
    )
    return job, restore


def load_data(config: Config, run: RunDir, ranks: Ranks) -> Data:
    """The data to train and evaluate on, the same on all ranks. A collective.

    A prepared corpus is opened, which reads its manifest; the driver has noted in the run directory which one.

    Raises:
        FileNotFoundError: if the corpus is not where it was: it must be at a path that every node sees.
        ValueError: if ranks read different files: they would train on something that no seed names, or wait for each
            other for ever.
    """
    seq_len, sources = config.train.seq_len, dict[str, TokenSource]()
    if config.corpora:
        noted = ranks.on_rank_zero(run.data)
        assert noted is not None, "the driver notes the corpora before it starts workers"
        s3 = asdict(config.run.s3)
        sources = {
            name: open_source(each, s3) or Corpus(storage_at(noted[name]["path"], s3))
            for name, each in config.corpora.items()
        }
    own = [each for each in (config.data, *config.evaluation_sets.values()) if plugin.is_plugin(each.source)]
    tokenizer = build_tokenizer(config.data.tokenizer if own else None)  # which nothing else needs
    if plugin.is_plugin(config.data.source):
        splits = own_splits(config.data, tokenizer, seq_len)
    else:
        splits = open_splits(config.data, sources, seq_len)
    sets = open_sets(config.evaluation_sets, sources, tokenizer, seq_len, config.train.global_batch_size)
    mine = [split.fingerprint for split in (*splits, *sets.values())]
    same = mine == ranks.broadcast(mine)
    if not ranks.all_reduce_min(same):
        different = [rank for rank, as_rank_0 in enumerate(ranks.gather(same)) if not as_rank_0]
        raise ValueError(f"ranks {different} read other data than rank 0: the files, or their Python, are not the same")
    return Data(*splits, sets)


def _device_seconds(config: Config, operations: float | None) -> float | None:
    """Seconds of a device at its peak rate for one position; None if the model's operations or the peak are not known.

    Args:
        config: of the run.
        operations: of the model for a position.
    """
    tera, engine = config.logging.peak_tflops, config.engine
    if tera is None and config.cluster.use_gpu:
        tera = peak_tflops(torch.cuda.get_device_name(), engine.precision or "bfloat16", engine.tf32)
    return None if operations is None or tera is None else operations / (tera * 1e12)


def _sinks(config: Config, start: Start) -> list[MetricsSink]:
    if not start.first:
        return []
    run, say = start.run, start.say
    own = [build_tracker(config, i, run, say) for i in range(len(config.trackers))]
    return [Console(say, config.train.steps), MetricsFile(run, say), *own]
