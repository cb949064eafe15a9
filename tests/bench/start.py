"""From the command to the first finished step, on a Ray cluster that runs already (torchrun needs none)."""

from . import arms, report
from .launch import Cluster
from .options import Options

ARMS = ("tutorial", "torchrun", "hf-ddp", "areal_ray", "areal_ray-no-standbys")


def run(options: Options) -> list[dict]:
    names = arms.available(ARMS, options.only)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with Cluster(2) as cluster:
        for number in range(options.rounds + 1):  # the first one fills the page cache
            for name in options.order(names, number):
                with arms.started(name, arms.Task(steps=2), cluster.address) as job:
                    first = job.wait(lambda job=job: job.events("step"))[0]
                    job.wait_for_end()
                took = first["time"] - job.began
                report.said(name, f"{took:.2f} s" + ("" if number else " (warming up)"))
                if number:
                    seconds[name].append(took)
    return [report.show("command to first finished step, running cluster", "s", seconds, "tutorial")]
