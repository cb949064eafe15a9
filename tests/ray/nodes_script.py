"""Trains on a cluster of two nodes that changes under the run; a process of its own, as one process knows one cluster.

python -m tests.ray.nodes_script CHANGE ARGUMENTS...: CHANGE is add, remove or drain (the second node), once the run has
its first checkpoint, or strange: one is added that says it has another torch; ARGUMENTS are those of `areal-ray train`.
When the run has gone on, perhaps in another number of workers, and saved, it is asked to stop. With none for CHANGE the
run is left to itself, to its end. Ends with its exit status.
"""

import json
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from areal_ray.cli.main import main as run_cli
from areal_ray.cluster.requests import requests_to

DRAIN_FOR_PREEMPTION = 2  # ray.proto: DRAIN_NODE_REASON_PREEMPTION
DEADLINE_S = 60


def option(arguments: list[str], key: str) -> str:
    return next(text.partition("=")[2] for text in arguments if text.startswith(f"{key}="))


def events(run: Path, kind: str) -> list[dict]:
    ledger = run / "events.jsonl"
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def another_torch(folder: Path) -> str:
    """What an installation says of itself, to be found before the right one."""
    about = folder / "site" / "torch-2.99.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.99.0\n")
    return str(about.parent)


def main(change: str, arguments: list[str]) -> int:
    run = Path(option(arguments, "run.storage_path"), option(arguments, "run.name"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    status: list[int] = []
    try:
        ray.init(address=cluster.address, logging_level="ERROR")
        there = change not in ("add", "strange")
        second = cluster.add_node(num_cpus=1, node_name="second") if there else None
        training = threading.Thread(target=lambda: status.append(run_cli(["train", *arguments])))
        training.start()
        if change == "none":
            training.join()
            return status[0]
        while training.is_alive() and not events(run, "saved"):
            time.sleep(0.05)
        # Nodes start and end in the main thread only: they set signal handlers.
        if change == "add":
            cluster.add_node(num_cpus=1)
        elif change == "strange":
            cluster.add_node(num_cpus=1, node_name="second", env_vars={"PYTHONPATH": another_torch(run.parent)})
        elif change == "remove":
            cluster.remove_node(second, allow_graceful=False)
        else:
            deadline = int((time.time() + DEADLINE_S) * 1000)
            client = ray._raylet.GcsClient(address=cluster.address)
            accepted, reason = client.drain_node(second.node_id, DRAIN_FOR_PREEMPTION, "taken back", deadline)
            assert accepted, reason
        while training.is_alive() and events(run, "saved")[-1]["attempt"] < 2:
            time.sleep(0.05)
        fast_restarts = "cluster.fast_restarts=off" not in arguments
        requests_to(events(run, "submitted")[0]["submission"], fast_restarts).ask("stop")
        training.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    return status[0] if status else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
