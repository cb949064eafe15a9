"""Ranks of a process group, spawned inside pytest: no launcher, no Ray, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


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
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world_size)}
    environment |= {"OMP_NUM_THREADS": "1"} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    job = pickle.dumps((function, args))  # opened in the child after its environment is set: it imports torch
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    deadline = time.monotonic() + time_limit_s
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(context.Process(target=_child, args=(theirs, own, job), daemon=True))
            processes[rank].start()
            theirs.close()  # so that the end of the child is the end of the pipe
            pipes[ours] = rank
        results: dict[int, Any] = {}
        while len(results) < world_size:
            ready = wait([pipe for pipe, rank in pipes.items() if rank not in results], deadline - time.monotonic())
            if not ready:
                late = sorted(set(range(world_size)) - set(results))
                raise RankFailed(f"ranks {late} were not done after {time_limit_s} s")
            for pipe in ready:
                results[pipes[pipe]] = _receive(pipe, pipes[pipe], processes[pipes[pipe]])  # type: ignore[arg-type,index]
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [results[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _receive(pipe: Connection, rank: int, process: Any) -> Any:
    try:
        failure, result = pickle.loads(pipe.recv_bytes())  # noqa: S301  (from our own child)
    except EOFError:
        process.join()
        raise RankFailed(f"rank {rank} died, exit code {process.exitcode}") from None
    if failure is not None:
        raise RankFailed(f"rank {rank} failed:\n{failure}")
    return result


def _child(pipe: Connection, environment: dict[str, str], job: bytes) -> None:
    os.environ.update(environment)
    try:
        function, args = pickle.loads(job)  # noqa: S301  (from our own parent)
        outcome = (None, function(int(environment["RANK"]), *args))
    except BaseException:  # noqa: BLE001  (raised again in the parent)
        outcome = (traceback.format_exc(), None)
    pipe.send_bytes(pickle.dumps(outcome))
    distributed = sys.modules.get("torch.distributed")
    if outcome[0] is None and distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
