"""A node with a worker goes while another stays, under num_workers [1, 2]: to the next finished step."""

import time

from . import arms, report
from .bounds import NODE
from .launch import Cluster
from .options import Options
from .restart import EVERY, has_checkpoint

ARMS = ("tutorial", "tutorial-best", "areal_ray")
LIMIT_S = 300.0


def run(options: Options) -> list[dict]:
    names = arms.available(ARMS, options.only)
    task = arms.Task(every=EVERY, workers=[1, 2])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in options.order(names, number):
            with Cluster(1, 1) as cluster, arms.started(name, task, cluster.address) as job:
                job.wait(lambda job=job: has_checkpoint(job))
                at = time.time()
                cluster.remove_node()
                last = [line for line in job.events("step") if line["time"] <= at][-1]
                after = job.wait(lambda job=job, last=last: job.step_after(last), LIMIT_S)
                seconds[name].append(after["time"] - at)
                report.said(name, f"{after['time'] - at:.2f} s")
    return [report.show(NODE, "s", seconds, "tutorial")]
