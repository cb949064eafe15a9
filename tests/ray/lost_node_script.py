"""Trains on a cluster that loses the node of rank 1; a process of its own, as one process knows one cluster.

python -m tests.ray.lost_node_script NODES STEP ARGUMENTS...: on so many nodes for one worker each, and a head for none.
When STEP has a line in metrics.jsonl, every process of that node is killed, its raylet last. ARGUMENTS are those of
`areal-ray train`. Ends with its exit status.
"""

import json
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from areal_ray.cli.main import main as run_cli
from tests.bench.cluster_process import lose
from tests.ray.nodes_script import events, option


def reached(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def main(nodes: int, step: int, arguments: list[str]) -> int:
    run = Path(option(arguments, "run.storage_path"), option(arguments, "run.name"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    status: list[int] = []
    try:
        ray.init(address=cluster.address, logging_level="ERROR")
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        training = threading.Thread(target=lambda: status.append(run_cli(["train", *arguments])))
        training.start()
        while training.is_alive() and reached(run) < step:
            time.sleep(0.01)
        lose(cluster, events(run, "attempt")[-1]["pids"][1])
        training.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    return status[0] if status else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
