"""A Ray cluster on this machine, as a process that others can end: python -m tests.bench.cluster_process CPUS [CPUS...]

One node for each number. Prints the address; reads lines: `remove` kills the last node, `replace PID` the one on which
a process runs, with all that runs there, and adds one like it; at the end of the input all.
"""

import contextlib
import sys

import psutil
from ray.cluster_utils import Cluster


def environment(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.Error):
        return process.environ()
    return {}


def lose(cluster: Cluster, worker: int) -> None:
    """Kill all that runs on the node of a worker, the processes that keep memory there among them."""
    raylet = environment(psutil.Process(worker))["RAY_RAYLET_PID"]
    node = next(each for each in cluster.worker_nodes if str(each.all_processes["raylet"][0].process.pid) == raylet)
    there = [each for each in psutil.process_iter() if environment(each).get("RAY_RAYLET_PID") == raylet]
    for process in [*there, psutil.Process(int(raylet))]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    cluster.remove_node(node, allow_graceful=False)


def main(cpus: list[int]) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], "include_dashboard": False})
    try:
        others = [cluster.add_node(num_cpus=count) for count in cpus[1:]]
        print(f"address {cluster.address}", flush=True)
        for line in sys.stdin:
            command, *pids = line.split()
            if command == "remove":
                cluster.remove_node(others.pop(), allow_graceful=False)
                print("removed", flush=True)
            elif command == "replace":
                lose(cluster, int(pids[0]))
                cluster.add_node(num_cpus=cpus[-1])
                print("replaced", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main([int(count) for count in sys.argv[1:]])
