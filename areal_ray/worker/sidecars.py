"""Sidecars of a training worker: its standbys, its watchdog, the detector of stragglers, a stopwatch."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import ray.train

from areal_ray.cluster.console import log, say
from areal_ray.cluster.head_watch import watching
from areal_ray.cluster.nodes import this_node, this_node_id
from areal_ray.cluster.spare_nodes import SpareNodes
from areal_ray.cluster.standbys import Standbys
from areal_ray.config import Config
from areal_ray.data import GlobalBatches
from areal_ray.distributed import Ranks, flight_recorder
from areal_ray.engine import FSDPEngine
from areal_ray.run import JobContext, RunDir, versions
from areal_ray.run.shared_storage import SharedStorage, agree
from areal_ray.run.versions import OtherVersions
from areal_ray.worker.stragglers import StragglerDetector
from areal_ray.worker.watchdog import Stuck, Watchdog

_COMPARE_STEPS = 16  # between two comparisons of the ranks
CUT_OFF = 87  # exit status of a worker that has heard nothing from the head node
_LOOK_S = 5.0  # between two looks at the head node, from every node with workers


def check_storage(context: JobContext, ranks: Ranks) -> None:
    """Show that all nodes share the run directory; RankError if not. A collective."""
    place, node = ray.train.get_context(), f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
    storage = SharedStorage(context.run.storage, context.submission, node)
    first = place.get_local_rank() == 0
    agree(storage, place.get_node_rank(), first, ranks.all_or_raise, ranks.all_reduce_min)


def check_versions(context: JobContext, ranks: Ranks) -> None:
    """Show that all nodes have the driver's packages. A collective, of one word if they have.

    Python and Ray themselves are compared by Ray when a node joins, unless it is told not to.

    Raises:
        OtherVersions: on every rank, with all nodes that have others: the controller acts on the first that it hears.
    """
    mine = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
    problem = versions.mismatch(context.versions, versions.versions(), mine)
    if not ranks.all_reduce_min(problem is None):
        told = ranks.gather((this_node()[0], problem))
        nodes = {node: text for node, text in told if text is not None}
        raise OtherVersions(nodes, context.versions, here=problem is not None)


def head_watch(leave: Callable[[int], object] = os._exit) -> AbstractContextManager[None]:
    """Ends this process when the head node has not answered for as long as the driver waits for it.

    By then the driver has given up, or others train in the place of a node that is cut off. One process of each node
    looks, and the others end with it: without it no collective comes to an end. To be entered while it trains.

    Args:
        leave: ends the process, with its exit status.
    """
    if ray.train.get_context().get_local_rank() != 0:
        return nullcontext()
    address = ray.get_runtime_context().gcs_address

    def lost() -> None:
        say(f"the head node ({address}) does not answer any more: leaving, as others may have taken over")
        leave(CUT_OFF)

    return watching(address, log, lost, look_s=_LOOK_S)


def standbys(config: Config, run: RunDir, ranks: Ranks, nodes: Sequence[str]) -> list[Standbys | SpareNodes]:
    """The standbys of this node, in one of its workers, and those of nodes without workers, on rank 0. A collective.

    Rank 0's writes its figures down: several machines would mix their lines on NFS.
    """
    context = ray.train.get_context()
    count = config.standbys(context.get_local_world_size())
    occupied = ranks.gather_to_rank_zero(this_node_id())
    if not count or context.get_local_rank() != 0:
        return []

    def report(ready: int, memory: int, seconds: float) -> None:
        if ranks.rank == 0:
            figures = {"ready": ready, "memory_mb": round(memory / 1e6), "seconds": round(seconds, 2)}
            run.note("standbys", say, node=nodes[0], **figures)

    here = Standbys("worker", count, report, say)
    if occupied is None:
        return [here]

    def note(kind: str, **fields: Any) -> None:
        run.note(kind, say, **fields)

    events = run.turning_points()
    return [here, SpareNodes(set(occupied), count, config.worker_resources, events, note, say)]


def watchdog(config: Config, run: RunDir, ranks: Ranks) -> Watchdog | None:
    """The watchdog of this worker, which writes where the process hangs to the log and the run directory."""
    if config.cluster.watchdog is None:
        return None

    def stuck(what: Stuck) -> None:
        log(f"stuck for {what.seconds:.1f} s in phase {what.phase}\n{what.stacks}")
        waits = " (waiting for others)" if what.waiting else ""
        say(f"worker {ranks.rank} is stuck for {what.seconds:.1f} s at {what.where}{waits}: ending it")
        attempt = what.attempt or 0
        with suppress(OSError):
            newest = run.newest("attempt") if what.attempt is None else None
            attempt = newest["attempt"] if newest else attempt
        name = f"stacks.a{attempt}.rank{ranks.rank}.txt"
        fields: dict[str, Any] = {
            "phase": what.phase,
            "step": what.step,
            "seconds": round(what.seconds, 2),
            "where": what.where,
        }
        fields |= {"waiting": what.waiting, "stacks": name}
        run.note("stuck", say, attempt=attempt, rank=ranks.rank, **fields)
        with suppress(OSError):  # it is in the log, too
            run.storage.replace(name, what.stacks.encode())
        if not config.cluster.use_gpu:
            return
        try:  # after all else: where CUDA hangs the recorder may, too, and it is PyTorch's private part
            if (trace := flight_recorder.dump()) is not None:
                fields["collectives"] = flight_recorder.entered(trace)
                run.note("stuck", say, attempt=attempt, rank=ranks.rank, **fields)
                run.storage.replace(f"collectives.a{attempt}.rank{ranks.rank}.pickle", trace)
        except Exception as error:  # noqa: BLE001  (whatever it is, the process is to be ended)
            log(f"no collectives from the flight recorder: {type(error).__name__}: {error}")

    return Watchdog(config.cluster.watchdog, stuck)


def stragglers(
    config: Config, engine: FSDPEngine, batches: GlobalBatches, ranks: Ranks, run: RunDir, nodes: Sequence[str]
) -> StragglerDetector:
    """The straggler detector of this worker. Its hooks are beside FSDP's, outside of what is compiled of a unit."""

    def slow(rank: int, seconds: float, usual: float) -> None:
        say(f"worker {rank} on {nodes[rank]} is slow: {seconds:.2f} s of its own per step, the others {usual:.2f} s")
        what = {"rank": rank, "node": nodes[rank], "own_s": round(seconds, 4), "others_s": round(usual, 4)}
        run.note("straggler", say, **what)

    return StragglerDetector(engine.shard_units, lambda: batches.seconds, engine.device, ranks, _COMPARE_STEPS, slow)


class Stopwatch:
    """Seconds from lap to lap, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._at = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._at = round(now - self._at, 3), now
