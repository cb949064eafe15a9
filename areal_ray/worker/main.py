"""The composition root of one rank: config -> objects -> loop.train."""

from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from typing import Any

import torch

from areal_ray.checkpoint import Catalog
from areal_ray.cluster import failures
from areal_ray.cluster.console import say, say_end
from areal_ray.cluster.requests import PlannedRestart, requests_to
from areal_ray.config import Config, plugin
from areal_ray.distributed import Ranks
from areal_ray.engine import FSDPEngine
from areal_ray.engine.objectives import build_objective
from areal_ray.run import RunDir
from areal_ray.run.job_context import JobContext
from areal_ray.train import loop
from areal_ray.train.faults import Faults
from areal_ray.train.journal import Journal, retention
from areal_ray.worker import sidecars
from areal_ray.worker.session import RaySession
from areal_ray.worker.watchdog import Watchdog
from areal_ray.worker.wiring import Start, build_job, load_data, memory_copies, recover_handler


def main(config: Config, context: JobContext) -> dict[str, Any]:
    """Train one rank; Ray calls it in every worker, again after every restart.

    Args:
        config: with absolute paths.
        context: of this submission.

    Returns:
        step, loss (None if the last step was left out) and world_size at the end, for the driver; reason, "stop" if it
        was asked to.

    Raises:
        PlannedRestart: when the workers are to be started again, in another number or elsewhere.
    """
    # A spare process has imported torch before Ray said how many cores it has; threads change speed and last bits.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    plugin.extend_path(context.search_path)
    try:
        return _train(config, context)
    except PlannedRestart:
        raise
    except Exception as error:
        if not hasattr(error, "areal_ray"):
            failures.annotate(error, None)
        failures.ensure_picklable(error)
        raise


def _train(config: Config, context: JobContext) -> dict[str, Any]:
    run, ranks = context.run, Ranks()
    with sidecars.watchdog(config, run, ranks) or nullcontext() as watchdog:
        return _train_watched(config, context, ranks, watchdog)


def _train_watched(config: Config, context: JobContext, ranks: Ranks, watchdog: Watchdog | None) -> dict[str, Any]:
    run, clock, catalog = context.run, sidecars.Stopwatch(), Catalog(context.run.storage)
    objective = build_objective(config.objective)
    engine = FSDPEngine(config, device="cuda" if config.cluster.use_gpu else "cpu")
    # A run that has saved goes on from a checkpoint or not at all: see RecoverHandler.load.
    fresh = not ranks.on_rank_zero(lambda: catalog.last_committed() is not None)
    engine.initialize(weights=fresh, references=objective.references)
    attempt = ranks.on_rank_zero(lambda: run.next_attempt(catalog.last_attempt()))
    start = Start(attempt, run, ranks, say if ranks.rank == 0 else _silent, catalog)
    places = ranks.gather((socket.gethostname(), os.getpid()))
    nodes, pids = [node for node, _ in places], [pid for _, pid in places]
    clock.lap("build_s")
    if start.first:
        run.note("attempt", say, attempt=attempt, **engine.describe(), nodes=nodes, pids=pids)
    faults = Faults(config.faults, run, ranks)
    standbys = sidecars.standbys(config, run, ranks, nodes) if context.fast_restarts else None
    requests = requests_to(context.submission, context.fast_restarts)
    session = RaySession(faults, ranks, requests, run.storage, standbys, watchdog, context.fast_restarts)
    data = load_data(config, ranks)
    kept = retention(run, attempt, start.say, catalog, config.checkpoint.keep)
    journal = Journal(run if start.first else None, attempt, start.say, kept)
    memory = memory_copies(config, ranks, context, say)
    info = {**engine.describe(), "data": data[0].fingerprint}
    job, restore = build_job(
        config,
        start,
        engine,
        data,
        faults.spoiling(objective),
        session,
        lambda state: recover_handler(config, start, state, info, journal, memory),
        journal,
    )
    session.stragglers = sidecars.stragglers(config, engine, job.batches, ranks, run, nodes)
    clock.lap("data_s")
    restore.at_start(_workers(engine, ranks))
    clock.lap("load_s")
    if start.first:
        kept.clean_up(attempt)

    def stepped(step: int) -> None:
        clock.lap("first_step_s")
        if start.first:
            run.note("training", say, attempt=attempt, step=step, **clock.laps)

    session.first_step = stepped
    try:
        loop.train(job)
    except Exception as error:
        failures.annotate(error, session.computing)
        raise
    finally:
        job.metrics.close()
    # What is finished is not interrupted.
    reason = session.reason if job.progress.step < config.last_step else None
    # All wait for rank 0's last lines: the first worker that ends has the others ended.
    ranks.on_rank_zero(lambda: _leave(run, reason, job.progress.step))
    if reason in ("resize", "preempted"):
        raise PlannedRestart(f"{reason} at step {job.progress.step}")
    loss = job.progress.metrics.get("loss")
    return {"step": job.progress.step, "loss": loss, "world_size": ranks.size, "reason": reason}


def _workers(engine: FSDPEngine, ranks: Ranks) -> str:
    parameters = sum(p.numel() for p in engine.model.parameters())
    return f"{parameters / 1e6:.1f}M parameters on {ranks.size} {engine.device.type} worker{'s' * (ranks.size != 1)}"


def _silent(_: str) -> None:
    """Says nothing, on all ranks but the first."""


def _leave(run: RunDir, reason: str | None, step: int) -> None:
    if reason is not None:
        run.note("left", say, reason=reason, step=step)
    if reason == "preempted":
        say(f"a node is being taken away: saved at step {step}, going on without it")
    run.flush()
    say_end()
