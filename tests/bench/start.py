"""From the command to the first finished step, on a Ray cluster that runs already (torchrun needs none)."""

import time

from . import arms, report
from .bounds import START
from .launch import Cluster, title
from .options import Options

ARMS = ("tutorial", "tutorial-best", "torchrun", "hf-ddp", "areal_ray", "areal_ray-no-standbys")
CALM_S = 10.0


def calm(cluster: Cluster) -> None:
    """Wait until no process of the job before is left to take this one's time, or to be taken by it; not for ever."""
    deadline = time.monotonic() + CALM_S
    while time.monotonic() < deadline:
        titles = [title(process) for process in cluster.processes()]
        if not any(name.startswith("ray::") and not name.endswith("Agent") for name in titles):
            return
        time.sleep(0.2)


def run(options: Options) -> list[dict]:
    names = arms.available(ARMS, options.only)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with Cluster(2) as cluster:
        for number in range(options.rounds + 1):  # the first one fills the page cache
            for name in options.order(names, number):
                calm(cluster)
                with arms.started(name, arms.Task(steps=2), cluster.address) as job:
                    first = job.wait(lambda job=job: job.events("step"))[0]
                    job.wait_for_end()
                took = first["time"] - job.began
                report.said(name, f"{took:.2f} s" + ("" if number else " (warming up)"))
                if number:
                    seconds[name].append(took)
    return [report.show(START, "s", seconds, "tutorial")]
