"""Rendezvous of the workers of a group: at a store that is open before they come, on devices that are free."""

from __future__ import annotations

import socket
import threading
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

from areal_ray.cluster.console import say
from areal_ray.cluster.nodes import use_own_interface
from areal_ray.cluster.ray_internals import find_address_function

_ENDING_S = 30.0  # so long processes that have been killed are waited for
_NAMED = 8  # nodes, in a message
_SLOW_S = 5.0  # a process group of ranks that are there takes less
_LOOKUP_S = 1.0


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

    Attributes:
        met_at: host and port of the store, once it is there.
    """

    def __init__(self, workers: Any) -> None:
        self._workers = workers
        self.met_at: tuple[str, int] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workers, name)

    def __len__(self) -> int:
        return len(self._workers)

    def execute_single(self, rank: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if function is not find_address_function():
            return self._workers.execute_single(rank, function, *args, **kwargs)
        self.met_at = self._workers.execute_single(rank, _address)
        return self.met_at


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


def name_slow_lookup(
    address: str,
    say: Callable[[str], None],
    look_up: Callable[[tuple[str, int], int], object] = socket.getnameinfo,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Say so if it takes long to look up the name of an address: torch does that for its connections, and waits.

    Args:
        address: of a node.
        say: prints a line for the user.
        look_up: finds the name.
        clock: seconds.
    """
    began = clock()
    with suppress(OSError):  # no name; it is about the time
        look_up((address, 0), 0)
    if (seconds := clock() - began) > _LOOKUP_S:
        say(
            f"the name server takes {seconds:.0f} s for the name of {address}, and each rank asks at every start: name "
            "the nodes in /etc/hosts"
        )


class ProcessGroupError(RuntimeError):
    """The ranks did not come together; says between which addresses.

    Args:
        error: of a rank.
        places: of all ranks, as `use_own_interface` returns them.
    """

    def __init__(self, error: Exception, places: Sequence[str]) -> None:
        self.cause, self.places = getattr(error, "cause", error), list(places)
        nodes = list(dict.fromkeys(places))
        more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
        text = str(self.cause).strip().splitlines() or [""]
        super().__init__(f"no process group between {', '.join(nodes[:_NAMED])}{more}: {text[-1]}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.cause, self.places)


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if worker_group.ending and worker_group.get_resources_per_worker().get("GPU"):
            worker_group.execute(wait_for, worker_group.ending)
        worker_group.reached["ready"] = time.time()
        places, workers, began = worker_group.execute(use_own_interface), RankZeroStoreFirst(worker_group), time.time()
        try:
            super().on_start(workers, backend_config)
        except ray.exceptions.RayTaskError as error:  # a rank could not; one that has died is another error
            raise ProcessGroupError(error, places) from error
        if time.time() - began > _SLOW_S and workers.met_at:
            threading.Thread(target=name_slow_lookup, args=(workers.met_at[0], say), daemon=True).start()

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: the processes end next. Ray would have each leave its process group, and wait for one that hangs."""


class GroupTorchConfig(TorchConfig):
    """Ray's, for a `worker_group.Group`, whose `reached` and `ending` it knows."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend
