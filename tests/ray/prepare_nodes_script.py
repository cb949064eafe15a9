"""Prepares a corpus on a cluster that loses a node; a process of its own, as one process knows one cluster.

python -m tests.ray.prepare_nodes_script TEXT CORPORA: the files of a folder, about a group each, on two nodes. Whoever
reads 07.txt first waits there until every process of its node is killed.
"""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from areal_ray.config import DataConfig
from areal_ray.data import build_tokenizer
from areal_ray.data.corpus import planning, prepare
from areal_ray.driver.ray_prepare import on_cluster
from areal_ray.storage import LocalStorage
from tests.bench.cluster_process import lose


class Stalling:
    def __init__(self, source, marker):
        self.source, self.marker = source, marker
        self.notes, self.skipped = [], source.skipped

    def read(self, part):
        if part.path.endswith("07.txt") and not self.marker.exists():
            partial = self.marker.with_suffix(".partial")
            partial.write_text(str(os.getpid()))
            partial.rename(self.marker)
            signal.pause()
        yield from self.source.read(part)


def main(text: Path, corpora: Path) -> None:
    planning.GROUP_BYTES = 300
    marker = corpora.with_suffix(".pid")
    plan = planning.make_plan(
        DataConfig(source="text", paths=[str(text)], held_out=0.25), build_tokenizer("bytes"), LocalStorage(corpora)
    )
    plan = replace(plan, work=replace(plan.work, source=Stalling(plan.work.source, marker)))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, logging_level="ERROR")
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        with ThreadPoolExecutor(1) as pool:
            preparing = pool.submit(prepare.prepare, plan, on_cluster, print)
            while not marker.exists() and not preparing.done():
                time.sleep(0.01)
            lose(cluster, int(marker.read_text()))
            preparing.result()
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
