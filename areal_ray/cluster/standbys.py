"""Standbys: idle processes with their imports done, in which the workers of a restarted group start.

A new worker process spends most of a restart on importing Ray Train, torch and the model's code. Ray's raylet can be
told to start idle processes ahead of need (its PrestartWorkers call, which Ray makes itself when tasks queue up), and
gives them to the next actors of the same job and runtime environment. The call is internal to Ray; where it is refused
a restart is an ordinary one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from areal_ray.cluster import ray_internals

WARM_UP_S = 120.0  # time limit for a standby to do its imports
_KEEP_S = 30 * 24 * 3600  # time that the raylet lets a standby wait
_CALL_S = 10.0  # time limit of the call
_FREE = 0.1  # share of a node's memory that must be left when the standbys are there
_MEMORY = 600e6  # bytes that one takes, before one has been measured


def ready_folder(kind: str) -> Path:
    """Folder in which the processes of this job on this node that have done their imports are listed, by process id."""
    session, context = ray_internals.session_directory(), ray.get_runtime_context()
    return Path(session) / "areal_ray" / context.get_job_id() / context.get_node_id() / kind


def prestart(count: int, node: Mapping[str, Any] | None = None) -> None:
    """Have a raylet start idle processes like this one: same job, same environment.

    Args:
        count: how many.
        node: one of `ray.nodes()`; None: that of this process.

    Raises:
        grpc.RpcError: if the raylet refuses.
    """
    context = ray.get_runtime_context()
    if node is None:
        node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    job, environment = context.get_job_id(), context.get_runtime_env_string()
    with ray_internals.node_service(node) as service:
        ray_internals.prestart_workers(service, job, environment, count, _KEEP_S, _CALL_S)


class Standbys:
    """Keeps a number of standbys for processes of one kind ready on this node.

    Args:
        kind: "worker" or "plain"; that of the process that asks.
        count: how many.
        report: told (ready, their memory in bytes, seconds that it took) when there are new ones.
        complain: prints a line for the user.
        warm_up_s: time limit for their imports.
        poll_s: time between two looks at how many are ready.
        start: starts so many of them.
    """

    def __init__(
        self,
        kind: str,
        count: int,
        report: Callable[[int, int, float], None],
        complain: Callable[[str], None],
        warm_up_s: float = WARM_UP_S,
        poll_s: float = 0.5,
        start: Callable[[int], None] = prestart,
    ) -> None:
        self._kind, self._count, self._report, self._complain = kind, count, report, complain
        self._warm_up_s, self._poll_s, self._start = warm_up_s, poll_s, start

    def replenish(self) -> None:
        """Start those that are missing, in the background."""
        threading.Thread(target=self._replenish, name="standbys", daemon=True).start()

    def _replenish(self) -> None:
        began = time.monotonic()
        try:
            missing = self._count - len(self._ready())
            if missing <= 0:
                return
            memory = psutil.virtual_memory()
            if memory.available - missing * _MEMORY < _FREE * memory.total:
                self._complain(f"no standbys: only {memory.available / 1e9:.1f} GB of memory are free on this node")
                return
            self._start(missing)
        except Exception as error:  # noqa: BLE001  (the call is internal to Ray; whatever it says, training goes on)
            text = " ".join(str(error).split())[:200]
            self._complain(f"no standbys, so that a restart takes longer: {type(error).__name__}: {text}")
            return
        while len(ready := self._ready()) < self._count:
            if time.monotonic() - began > self._warm_up_s:
                self._complain(f"only {len(ready)} of {self._count} standbys are ready after {self._warm_up_s:.0f} s")
                break
            time.sleep(self._poll_s)
        memory_used = 0
        for process in ready:
            with suppress(psutil.Error):  # taken, or gone, just now
                memory_used += process.memory_full_info().pss
        self._report(len(ready), memory_used, time.monotonic() - began)

    def _ready(self) -> list[psutil.Process]:
        """The processes that have done their imports and are still idle."""
        found = []
        for path in ready_folder(self._kind).glob("[0-9]*"):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                process = psutil.Process(int(path.name))
                if process.cmdline()[:1] == ["ray::IDLE"]:
                    found.append(process)
        return found
