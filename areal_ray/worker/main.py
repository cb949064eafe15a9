"""Entry point of one rank: config to objects (wiring.py), restore, train, leave."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from ray.train.torch import get_device

from areal_ray.cluster import failures
from areal_ray.cluster.console import say, say_end
from areal_ray.cluster.nodes import this_node
from areal_ray.cluster.requests import PlannedRestart
from areal_ray.config import Config, plugin
from areal_ray.distributed import Ranks
from areal_ray.engine import FSDPEngine
from areal_ray.run import RunDir
from areal_ray.run.job_context import JobContext
from areal_ray.storage.local import deny_writing_to_all
from areal_ray.train import loop
from areal_ray.worker import device_check, sidecars
from areal_ray.worker.device_check import Device
from areal_ray.worker.watchdog import Watchdog
from areal_ray.worker.wiring import wire

_SHOWN = 16  # processes on the screen


def main(config: Config, context: JobContext) -> dict[str, Any]:
    """Train one rank; Ray calls it in every worker, again after every restart.

    Args:
        config: with absolute paths.
        context: of this submission.

    Returns:
        step, loss (None if the last step was left out) and world_size at the end, for the driver; reason, "stop" if it
        was asked to, "early" if early stopping has ended it.

    Raises:
        PlannedRestart: when the workers are to be started again, in another number or elsewhere.
        BadDevice: when this rank's GPU is not fit to train on.
    """
    deny_writing_to_all()
    # A standby has imported torch before Ray said how many cores it has; threads change speed and last bits.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    plugin.extend_path(context.search_path)
    # Ray says which GPU; CUDA is not asked before the check, which has a limit.
    device = device_check.CudaDevice(get_device().index or 0, this_node) if config.cluster.use_gpu else None
    try:
        return _train(config, context, device)
    except PlannedRestart:
        raise
    except Exception as error:
        if not hasattr(error, "areal_ray"):
            failures.annotate(error, None)
        blamed = device_check.blame(device, error)
        if blamed is not error:
            raise blamed from None
        failures.ensure_picklable(error, context.search_path)
        raise


def _train(config: Config, context: JobContext, device: Device | None) -> dict[str, Any]:
    run, ranks = context.run, Ranks()
    with sidecars.head_watch(), sidecars.watchdog(config, run, ranks) or nullcontext() as watchdog:
        return _train_watched(config, context, ranks, watchdog, device)


def _train_watched(
    config: Config, context: JobContext, ranks: Ranks, watchdog: Watchdog | None, device: Device | None
) -> dict[str, Any]:
    run, clock = context.run, sidecars.Stopwatch()
    sidecars.check_versions(context, ranks)
    sidecars.check_storage(context, ranks)  # before an attempt is written down, in what may be another directory
    rank = wire(config, context, ranks, watchdog, clock, device)
    start, job, session = rank.start, rank.job, rank.session

    def loaded() -> None:
        clock.lap("load_s")
        if start.first:
            rank.retention.clean_up(start.attempt)

    def stepped(step: int) -> None:
        clock.lap("first_step_s")
        if start.first:
            run.note("training", say, attempt=start.attempt, step=step, **clock.laps)

    session.first_step = stepped
    try:
        rank.restore.at_start(_workers(rank.engine, ranks), loaded)
        start.say(_processes(rank.places, start.attempt == 1))
        job.recover.prepare()
        loop.train(job)
    except Exception as error:
        failures.annotate(error, session.computing)
        raise
    finally:
        job.metrics.close()
    # What is finished is not interrupted.
    reason = session.reason if job.progress.step < config.last_step and not job.stopping.reached else None
    # All wait for rank 0's last lines: the first worker that ends has the others ended.
    ranks.on_rank_zero(lambda: _leave(run, reason, job.progress.step))
    if reason in ("resize", "preempted"):
        raise PlannedRestart(f"{reason} at step {job.progress.step}")
    loss = job.progress.metrics.get("loss")
    ending = "early" if job.stopping.reached else reason
    return {"step": job.progress.step, "loss": loss, "world_size": ranks.size, "reason": ending}


def _workers(engine: FSDPEngine, ranks: Ranks) -> str:
    parameters, trained = engine.parameters
    some = "" if trained == parameters else f", {trained:,} of them trained,"
    workers = f"{ranks.size} {engine.device.type} worker{'s' * (ranks.size != 1)}"
    return f"{parameters / 1e6:.1f}M parameters{some} on {workers}"


def _processes(places: Sequence[tuple[str, int]], first: bool) -> str:
    """A line with the process ids of the ranks, for who wants to look at one, or to kill it.

    Args:
        places: host name and process id of every rank; all are in the ledger, some are shown.
        first: whether to say what for.
    """
    nodes: dict[str, list[int]] = {}
    for node, pid in places[:_SHOWN]:
        nodes.setdefault(node, []).append(pid)
    shown = "; ".join(f"{', '.join(map(str, pids))} on {node}" for node, pids in nodes.items())
    more = f"; {len(places) - _SHOWN:,} more in the ledger" if len(places) > _SHOWN else ""
    try_it = f" (kill -9 {places[-1][1]} there, and see the run come back)" if first and not more else ""
    return f"  processes: {shown}{more}{try_it}"


def _leave(run: RunDir, reason: str | None, step: int) -> None:
    if reason is not None:
        run.note("left", say, reason=reason, step=step)
    if reason == "preempted":
        say(f"a node is being taken away: saved at step {step}, going on without it")
    run.flush()
    say_end()
