"""Peak memory while training and saving: proportional set sizes, and what lies in /dev/shm mapped by nobody.

Shared pages are shared out among those who map them, so that the sum over processes is what is really taken.
"""

import shutil
import time

import psutil

from . import arms, report
from .launch import Job, tree
from .options import Options

ARMS = (
    "torchrun", "torchrun-dcp", "torchrun-full", "torchrun-async-thread", "torchrun-async-thread-best",
    "torchrun-async-process", "tutorial", "tutorial-async", "hf-ddp", "areal_ray", "areal_ray-no-standbys",
)  # fmt: skip
EVERY, STEPS = 10, 35
LIMIT_S = 600.0
_LOOK_S = 0.5  # reading the sizes of a few dozen processes takes tens of milliseconds


def proportional(pid: int) -> tuple[int, int]:
    """Bytes of a process: all, and those of it that are shared memory."""
    values = {"Pss": 0, "Pss_Shmem": 0}
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in values:
                    values[name] = int(rest.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        pass
    return values["Pss"], values["Pss_Shmem"]


def used(processes: list[psutil.Process], shm_before: int) -> float:
    """GB of these processes together, with files in /dev/shm that none of them maps (any more, or yet)."""
    sizes = [proportional(process.pid) for process in processes]
    unmapped = shutil.disk_usage("/dev/shm").used - shm_before - sum(shared for _, shared in sizes)
    return (sum(size for size, _ in sizes) + max(0, unmapped)) / 1e9


def peaks(job: Job, shm_before: int, standbys: bool) -> tuple[float, float]:
    """Of the training workers with what they have started, and of everything, Ray and the launcher among it.

    Until step STEPS has been reached, and the standbys, if it has some, are ready.
    """
    of_workers, of_all, deadline = 0.0, 0.0, time.monotonic() + LIMIT_S

    def done() -> bool:
        reached = job.events("step") and job.events("step")[-1]["step"] >= STEPS
        return bool(reached) and (not standbys or arms.standbys_ready(job))

    while job.process.poll() is None and not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not at step {STEPS} with all standbys after {LIMIT_S:.0f} s:\n{job.printed()}")
        everything = tree(job.process.pid) + (job.cluster.processes() if job.cluster else [])
        pids = {line["pid"] for rank in range(2) for line in job.events("start", rank)}
        workers = list(dict.fromkeys(process for pid in pids for process in tree(pid)))
        of_all = max(of_all, used(everything, shm_before))
        of_workers = max(of_workers, used(workers, shm_before) if workers else 0.0)
        time.sleep(_LOOK_S)
    if not done():
        raise RuntimeError(f"ended before:\n{job.printed()}")
    return of_workers, of_all


def run(options: Options) -> list[dict]:
    names = arms.available(ARMS, options.only)
    workers: dict[str, list[float]] = {name: [] for name in names}
    everything: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in options.order(names, number):
            every = None if name == "torchrun" else EVERY
            before = shutil.disk_usage("/dev/shm").used
            with arms.started(name, arms.Task(every=every, overrides=tuple(arms.LARGER))) as job:
                of_workers, of_all = peaks(job, before, standbys=name == "areal_ray" and arms.has_standbys())
            workers[name].append(of_workers)
            everything[name].append(of_all)
            report.said(name, f"{of_workers:.2f} GB, {of_all:.2f} GB with everything")
    return [
        report.show("peak memory, workers and what they start", "GB", workers, "torchrun"),
        report.show("peak memory, with launcher, driver, Ray and standbys", "GB", everything, "torchrun"),
    ]
