"""Pairs of ranks that leave their process group and end like any process, where gloo's threads get little of the core.

python -m tests.distributed.leaving_script COUNT: prints how each has ended, as `os.waitpid` says it.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from areal_ray.distributed.mesh import leave_distributed

HELD = []  # the group, as DTensor's caches do with a mesh: its end would wait for the threads


def end_after_a_collective(rank: int, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    HELD.append(dist.group.WORLD)
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().startswith("pt_gloo"):
            os.sched_setaffinity(int(task.name), {core})
            os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
    dist.all_reduce(torch.ones(1 << 10))  # nobody else has the tensor
    leave_distributed()
    sys.exit(0)


def main(count: int) -> None:
    ended = []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            pids = []
            for rank in range(2):
                if (pid := os.fork()) == 0:
                    end_after_a_collective(rank, f"{folder}/store")
                pids.append(pid)
            ended += [os.waitpid(pid, 0)[1] for pid in pids]
    print(ended)


if __name__ == "__main__":
    main(int(sys.argv[1]))
