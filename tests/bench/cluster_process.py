"""A Ray cluster on this machine, as a process that others can end: python -m tests.bench.cluster_process CPUS [CPUS...]

One node for each number. Prints the address; reads lines: `remove` kills the last node; at the end of the input all.
"""

import sys

from ray.cluster_utils import Cluster


def main(cpus: list[int]) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], "include_dashboard": False})
    try:
        others = [cluster.add_node(num_cpus=count) for count in cpus[1:]]
        print(f"address {cluster.address}", flush=True)
        for line in sys.stdin:
            if line.strip() == "remove":
                cluster.remove_node(others.pop(), allow_graceful=False)
                print("removed", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main([int(count) for count in sys.argv[1:]])
