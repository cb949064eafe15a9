"""Warm spare processes: a restarted group starts in processes that have done their imports already.

A new worker process spends most of a restart on importing Ray Train, torch and the model's code. Ray's raylet can be
told to start idle processes ahead of need (its PrestartWorkers call, which Ray makes itself when tasks queue up), and
gives them to the next actors of the same job and runtime environment. The call is internal to Ray: it is made in this
module only, and where it is refused a restart is an ordinary one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import ray

from areal_ray.cluster.nodes import raylet

_KEEP_S = 30 * 24 * 3600  # how long the raylet lets a spare wait
_CALL_S = 10.0  # time limit of the call
_WARM_S = 120.0  # time limit for spares to get warm
_LOOK_S = 0.5
_FREE = 0.1  # share of a node's memory that must be left when the spares are there
_MEMORY = 600e6  # bytes that one takes, before one has been measured


def _folder(kind: str) -> Path:
    """Where the processes of this job on this node that have got ready are listed, by process id."""
    session = ray._private.worker._global_node.get_session_dir_path()
    return Path(session) / "areal_ray" / ray.get_runtime_context().get_job_id() / kind


class Standbys:
    """Keeps a number of spares for processes of one kind ready on this node.

    Args:
        kind: "worker" or "plain"; that of the process that asks.
        count: how many.
        report: told (ready, their memory in bytes, seconds that it took) when there are new ones.
        complain: prints a line for the user.
    """

    def __init__(
        self, kind: str, count: int, report: Callable[[int, int, float], None], complain: Callable[[str], None]
    ) -> None:
        self._kind, self._count, self._report, self._complain = kind, count, report, complain

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
            prestart(missing)
        except Exception as error:  # noqa: BLE001  (the call is internal to Ray; whatever it says, training goes on)
            text = " ".join(str(error).split())[:200]
            self._complain(f"no standbys, so that a restart takes longer: {type(error).__name__}: {text}")
            return
        while len(ready := self._ready()) < self._count:
            if time.monotonic() - began > _WARM_S:
                self._complain(f"only {len(ready)} of {self._count} standbys are ready after {_WARM_S:.0f} s")
                break
            time.sleep(_LOOK_S)
        memory_used = 0
        for process in ready:
            with suppress(psutil.Error):  # taken, or gone, just now
                memory_used += process.memory_full_info().pss
        self._report(len(ready), memory_used, time.monotonic() - began)

    def _ready(self) -> list[psutil.Process]:
        """The processes that are warm and still idle."""
        found = []
        for path in _folder(self._kind).glob("[0-9]*"):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                process = psutil.Process(int(path.name))
                if process.cmdline()[:1] == ["ray::IDLE"]:
                    found.append(process)
        return found


def prestart(count: int) -> None:
    """Have the raylet of this node start idle processes like this one: same job, same environment.

    Raises:
        grpc.RpcError: if the raylet refuses.
    """
    from ray.core.generated import common_pb2, node_manager_pb2

    context = ray.get_runtime_context()
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.Language.PYTHON,
        job_id=bytes.fromhex(context.get_job_id()),
        keep_alive_duration_secs=_KEEP_S,
        num_workers=count,
    )
    request.runtime_env_info.serialized_runtime_env = context.get_runtime_env_string()
    with raylet(node) as service:
        service.PrestartWorkers(request, timeout=_CALL_S)
