"""The panel at the end of a run that failed."""

from __future__ import annotations

import sys

import ray

from areal_ray.cluster.failures import Cause
from areal_ray.run import RunDir


def show(cause: Cause, run: RunDir) -> None:
    """One panel on stderr with what is needed to go on."""
    try:
        attempts = run.events("attempt")
    except OSError:  # the storage may be why it failed
        attempts = []
    nodes = attempts[-1].get("nodes", []) if attempts else []
    rows = [("cause", f"{cause.kind}: {cause.message[:1000]}")]
    if cause.where:
        rows.append(("at", cause.where))
    if cause.rank is not None:
        node = nodes[cause.rank] if cause.rank < len(nodes) else "unknown"
        rows.append(("worker", f"rank {cause.rank} on node {node}"))
    rows.append(("ledger", run.ledger))
    rows.append(("logs", f"{_log_directory()} (on that node)"))
    width = max(len(name) for name, _ in rows)
    # No frame around it and no wrapping: paths are there to be copied.
    print("── training failed " + "─" * 61, file=sys.stderr)
    for name, value in rows:
        print(f"{name:<{width}}  {value}", file=sys.stderr)
    print("─" * 80, file=sys.stderr, flush=True)


def _log_directory() -> str:
    node = ray._private.worker._global_node
    return "Ray's session directory" if node is None else str(node.get_logs_dir_path())
