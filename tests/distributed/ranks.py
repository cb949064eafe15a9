"""Ranks of a process group, forked for pytest: no launcher, no Ray, nothing left behind."""

from __future__ import annotations

import atexit
import os
import pickle
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing.connection import wait
from typing import Any

from tests.distributed.rank_server import RankServer

_MODULES = (
    "areal_ray.engine",
    "areal_ray.train.journal",
    "areal_ray.train.loop",
    "pytest",
    "torch._dynamo",  # the first optimizer does
    "transformers.models.qwen3.modeling_qwen3",
)


class RankFailed(RuntimeError):
    """A rank raised (the message ends with its traceback), died, or was not done in time."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, gpu: bool = False, time_limit_s: float = 240
) -> list[Any]:
    """Run `function(rank, *args)` in `world_size` new processes with the variables that torchrun would set.

    Args:
        function: of a module; it makes its process group itself (the engine does), which is destroyed here.
        args: anything that pickles, small.
        gpu: let the ranks see the GPUs.
        time_limit_s: for all of it.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankFailed: as soon as one rank fails or the time is over; the others are ended then.
    """
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world_size)}
    environment = {**os.environ, **_environment(gpu), **common}
    job = pickle.dumps((function, args))
    servers = [_server(gpu, parity) for parity in range(min(world_size, 2))]
    deadline = time.monotonic() + time_limit_s
    busy, results = {server.connection: server for server in servers}, {}
    try:
        for parity, server in enumerate(servers):
            ranks = [str(rank) for rank in range(parity, world_size, 2)]
            server.fork({int(rank): {**environment, "RANK": rank, "LOCAL_RANK": rank} for rank in ranks}, job)
        while busy:
            ready = wait(list(busy), max(0.0, deadline - time.monotonic()))
            if not ready and len(results) == world_size:  # they have said all, and do not end
                break
            if not ready:
                late = sorted(set(range(world_size)) - set(results))
                raise RankFailed(f"ranks {late} were not done after {time_limit_s} s")
            for connection in ready:
                message = connection.recv()  # type: ignore[union-attr]
                if message is None:
                    del busy[connection]  # type: ignore[arg-type]
                    continue
                results[message[0]] = _result(*message)
                if len(results) == world_size:
                    for server in servers:
                        server.leave()
        return [results[rank] for rank in range(world_size)]
    except (EOFError, ConnectionError) as error:
        _server.cache_clear()  # the next ranks get new ones
        raise RankFailed(f"a server of the ranks has ended ({error!r})") from error
    finally:
        for server in busy.values():
            with suppress(EOFError, ConnectionError):  # it has ended, and its ranks with it
                server.end()


@cache
def _server(gpu: bool, parity: int) -> RankServer:
    """The server of the ranks with even or with odd numbers: two, as the hashes of strings differ between them.

    An order of names in a set that ranks rely on to be the same would show.
    """
    server = RankServer({**_environment(gpu), "PYTHONHASHSEED": "random"}, _MODULES)
    atexit.register(server.close)
    return server


def _environment(gpu: bool) -> dict[str, str]:
    # With a GPU: what is imported asks NVML for devices, since after a CUDA call no fork of a server could make one.
    return {"OMP_NUM_THREADS": "1"} | ({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"} if gpu else {"CUDA_VISIBLE_DEVICES": ""})


def _result(rank: int, outcome: bytes | None, exit_code: int | None) -> Any:
    if outcome is None:
        raise RankFailed(f"rank {rank} died, exit code {exit_code}")
    failure, result = pickle.loads(outcome)  # noqa: S301  (from our own child)
    if failure is not None:
        raise RankFailed(f"rank {rank} failed:\n{failure}")
    return result


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
