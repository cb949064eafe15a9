"""Rendezvous of the workers of a group: at a store that is open before they come, on devices that are free."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from areal_ray.cluster.ray_internals import find_address_function

_ENDING_S = 30.0  # so long processes that have been killed are waited for


@cache  # one process serves one group
def tcp_store() -> TCPStore:
    """The store that a process group meets at, in the process of rank 0, open to those that connect."""
    return TCPStore(ray.util.get_node_ip_address(), 0, is_master=True, wait_for_workers=False, multi_tenant=True)


def _address() -> tuple[str, int]:
    return tcp_store().host, tcp_store().port


class RankZeroStoreFirst:
    """A group of workers whose rank 0 has its store open before the others are told where it is.

    Ray looks for a free port and tells it to all ranks at once. Those that are there before rank 0 are refused, and
    wait half a second before they try again; and the port may be somebody else's by then. A store that is made for the
    same port afterwards, in the same process, is this one (torch's `multi_tenant`).
    """

    def __init__(self, workers: Any) -> None:
        self._workers = workers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workers, name)

    def __len__(self) -> int:
        return len(self._workers)

    def execute_single(self, rank: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        wanted = _address if function is find_address_function() else function
        return self._workers.execute_single(rank, wanted, *args, **kwargs)


def wait_for(ending: Mapping[str, Sequence[int]], patience_s: float = _ENDING_S) -> None:
    """Wait until those of these processes that run on this node are gone.

    Ray gives a GPU to the next process while the one before still ends, and until that has ended its memory is not
    free.

    Args:
        ending: process ids by node id.
        patience_s: at most.
    """
    processes = []
    for pid in ending.get(ray.get_runtime_context().get_node_id(), ()):
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    psutil.wait_procs(processes, timeout=patience_s)


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if worker_group.ending and worker_group.get_resources_per_worker().get("GPU"):
            worker_group.execute(wait_for, worker_group.ending)
        worker_group.reached["ready"] = time.time()
        super().on_start(RankZeroStoreFirst(worker_group), backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: the processes end next. Ray would have each leave its process group, and wait for one that hangs."""


class GroupTorchConfig(TorchConfig):
    """Ray's, for a `worker_group.Group`, whose `reached` and `ending` it knows."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend
