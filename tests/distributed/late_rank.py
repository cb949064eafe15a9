"""A rank that comes too late for a collective, and what the other one hears of it."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from areal_ray.cluster.failures import annotate


def run(rank: int) -> Exception | None:
    """Rank 0 waits for rank 1, which comes only when that has been given up; the exception of rank 0."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.new_group(timeout=timedelta(seconds=60))  # with which they meet; of collectives it is a second then
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    store = dist.distributed_c10d._get_default_store()
    error = None
    if rank == 0:
        try:
            dist.all_reduce(torch.ones(4), group=group)
        except RuntimeError as caught:
            annotate(caught, step=3)
            error = caught
        store.set("given up", "1")
    else:
        store.wait(["given up"])
    return error
