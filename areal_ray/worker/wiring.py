"""The composition root of one rank: config to objects."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint import AsyncWriter, Catalog, CheckpointWriter, MemoryCopies, Partners, SyncWriter
from areal_ray.checkpoint.retention import Retention
from areal_ray.cluster.console import say, tell
from areal_ray.cluster.nodes import this_node_id
from areal_ray.cluster.requests import PlannedRestart, requests_to
from areal_ray.config import Config
from areal_ray.distributed import Ranks
from areal_ray.distributed.peak import peak_bytes
from areal_ray.distributed.point_to_point import PointToPoint
from areal_ray.engine.fsdp import FSDPEngine
from areal_ray.engine.objectives import build_objective
from areal_ray.run import JobContext
from areal_ray.train import loop
from areal_ray.train.cadence import AutoCadence, SaveHistory
from areal_ray.train.faults import Faults
from areal_ray.train.journal import Journal, TunedSaves, retention
from areal_ray.train.recovery import RecoverHandler, SaveListener, SavePolicy
from areal_ray.train.restore import Restore, WatchedCatalog
from areal_ray.train.sinks import Pulse
from areal_ray.worker import device_check, sidecars
from areal_ray.worker.frozen import FrozenModels, recorded_references
from areal_ray.worker.job import build_job
from areal_ray.worker.provenance import provenance
from areal_ray.worker.ray_metrics import RayMetrics
from areal_ray.worker.session import RaySession
from areal_ray.worker.start import Start
from areal_ray.worker.watchdog import Watchdog


@dataclass(frozen=True)
class Rank:
    """The objects of one rank.

    Args:
        start, engine, job: which start of the workers it is; what is trained; what `loop.train` takes.
        restore, retention: bring the latest state; let checkpoints go.
        session: the job around the loop.
        places: host name and process id of every rank.
    """

    start: Start
    engine: FSDPEngine
    job: loop.Job
    restore: Restore
    retention: Retention
    session: RaySession
    places: list[tuple[str, int]]


def wire(
    config: Config,
    context: JobContext,
    ranks: Ranks,
    watchdog: Watchdog | None,
    clock: sidecars.Stopwatch,
    device: device_check.Device | None,
) -> Rank:
    """Make all objects of one rank under Ray Train. A collective.

    Args:
        config: checked.
        context: of the submission.
        ranks: all ranks.
        watchdog: that watches this rank already.
        clock: laps connect_s, build_s and data_s are taken on it.
        device: to check before the model is built; None on a CPU.
    """
    run, catalog, objective = context.run, Catalog(context.run.storage), build_objective(config.objective)
    engine = FSDPEngine(config, device="cuda" if config.cluster.use_gpu else "cpu")
    device_check.check(device)  # cuBLAS is used first here, with the engine's settings
    # A run that has saved goes on from a checkpoint or not at all: see RecoverHandler.load.
    fresh, recorded = ranks.on_rank_zero(lambda: (catalog.last_committed() is None, _recorded(config, catalog)))

    def entering(phase: str) -> None:
        if phase == "build":
            clock.lap("connect_s")
        if watchdog is not None:
            watchdog.beat(phase)

    before = ranks.on_rank_zero(lambda: recorded_references(catalog))
    frozen = FrozenModels(config, run, ranks, objective, before)
    engine.initialize(
        weights=fresh,
        references=frozen.wanted,
        reference_models=objective.reference_models,
        entering=entering,
        **recorded,
    )
    frozen.check(engine)
    attempt = ranks.on_rank_zero(lambda: run.next_attempt(catalog.last_attempt(), say))
    if watchdog is not None:
        watchdog.attempt = attempt
    start = Start(attempt, run, ranks, say if ranks.rank == 0 else _silent, catalog)
    places = ranks.gather((socket.gethostname(), os.getpid()))
    nodes, pids = [node for node, _ in places], [pid for _, pid in places]
    clock.lap("build_s")
    if start.first:
        run.note("attempt", say, attempt=attempt, **engine.describe(), nodes=nodes, pids=pids, marks_saves=True)
    faults = Faults(config.faults, run, ranks)
    standbys = sidecars.standbys(config, run, ranks, nodes) if context.fast_restarts else []
    requests = requests_to(context.submission, context.fast_restarts)
    session = RaySession(faults, ranks, requests, run.storage, standbys, watchdog, context.fast_restarts)
    data = frozen.data(engine, lambda: watchdog.beat("ask") if watchdog else None, start.say)
    kept = retention(run, attempt, start.say, catalog, config.checkpoint.keep)
    journal = Journal(run if start.first else None, attempt, start.say, kept)
    auto = auto_cadence(config, start, len(set(nodes)))
    heard: SaveListener = journal if auto is None else TunedSaves(auto, journal, ranks)
    memory = memory_copies(config, ranks, context, say)
    pulse = Pulse(tell, config.train.steps) if context.live and start.first else None
    info = {**engine.describe(), **frozen.described(engine), "data": data.train.fingerprint, "serving": context.serving}
    job, restore = build_job(
        config,
        start,
        engine,
        data,
        faults.spoiling(objective),
        session,
        lambda state: recover_handler(config, start, state, info, heard, memory),
        journal,
        PlannedRestart,
        auto,
        context.operations_per_token,
        [RayMetrics(config.run.name, ranks.rank, lambda: peak_bytes(engine.device)), *([pulse] if pulse else [])],
        pulse.beat if pulse else lambda _: None,
    )
    session.stragglers = sidecars.stragglers(config, engine, job.batches, ranks, run, nodes)
    clock.lap("data_s")
    return Rank(start, engine, job, restore, kept, session, places)


def recover_handler(
    config: Config,
    start: Start,
    state: Mapping[str, Stateful],
    info: Mapping[str, Any],
    journal: SaveListener,
    memory: MemoryCopies | None,
) -> RecoverHandler:
    """The recover handler of a run: saves and restores its state as checkpoints."""
    every = config.checkpoint
    policy = SavePolicy(every.when_busy == "skip", every.max_failed_saves)
    described = {**info, **provenance(config)}
    writer = _writer(config, start)
    catalog = WatchedCatalog(start.run, start.attempt, start.say)
    return RecoverHandler(catalog, state, writer, journal, start.attempt, described, start.ranks, policy, memory)


def auto_cadence(config: Config, start: Start, nodes: int) -> AutoCadence | None:
    """When to save, tuned by the run itself; None if the config says when. Rank 0 knows the past and decides."""
    if config.checkpoint.every != "auto":
        return None
    run, past = start.run, SaveHistory()
    if start.first:
        past = SaveHistory.of(run.newest("save_interval"), run.newest("failure"))

    def tell(fields: dict[str, Any]) -> None:
        run.note("save_interval", start.say, attempt=start.attempt, **fields)

    cadence = AutoCadence(nodes, past, tell, start.ranks.agree)
    if start.first:
        cadence.begin()
    return cadence


def memory_copies(config: Config, ranks: Ranks, context: JobContext, say: Callable[[str], None]) -> MemoryCopies | None:
    """Copies between checkpoints, in every rank; None if there are to be none."""
    if config.checkpoint.memory_every_steps is None:
        return None
    # Steps that are not computed again must have left their metrics.
    durable = context.run.flush if ranks.rank == 0 else lambda: None
    name, owner = context.submission, _node_process()
    partners = None
    if config.checkpoint.memory_partner:
        link = PointToPoint(_background_group())
        partners = Partners(name, ranks, link, this_node_id(), owner, say)
    return MemoryCopies(name, ranks, owner, say, durable, partners=partners)


def _recorded(config: Config, catalog: Catalog) -> dict[str, Any]:
    """What the run so far has chosen, which is to go on: arguments of `FSDPEngine.initialize`."""
    said = {"accumulate": config.engine.accumulate, "loss": config.model.loss}
    before = {"accumulate": "unsharded", "loss": "logits"}  # there was a choice
    if ("auto" not in said.values() and config.adapter is None) or (newest := catalog.newest()) is None:
        return {}
    chosen = {key: newest.info.get(key, before[key]) for key in said if said[key] == "auto"}
    another = {"model.path", "model.config", "model.factory", "run.seed"}  # with which the base may be
    if config.adapter is not None and another.isdisjoint(config.run.allow_changes):
        chosen["base"] = newest.info.get("adapter", {}).get("base", {}).get("fingerprint")
    return chosen


def _node_process() -> int | None:
    """Process id of this node's raylet, with which copies in memory end; None if this Ray does not say."""
    pid = os.environ.get("RAY_RAYLET_PID")
    return int(pid) if pid else None


def _writer(config: Config, start: Start) -> CheckpointWriter:
    if not config.checkpoint.async_save:
        return SyncWriter(start.ranks, start.say, start.run.fence.check)
    return AsyncWriter(start.ranks, Ranks(_background_group()), start.say, start.run.fence.check)


def _background_group() -> dist.ProcessGroup:
    """A group of all ranks for a thread. No time limit of its own: slowness is no failure, and a dead peer closes its
    connections."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def _silent(_: str) -> None:
    """Says nothing, on all ranks but the first."""
