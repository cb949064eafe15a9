"""The panel at the end of a run that failed."""

from __future__ import annotations

import sys

from areal_ray.cluster.failures import Cause
from areal_ray.run import RunDir
from areal_ray.run.directory import REPORT


def show(cause: Cause, run: RunDir, logs: str, advice: str | None = None) -> None:
    """Print one panel on stderr with all that is needed to go on.

    Args:
        cause: of the failure.
        run: the run directory.
        logs: directory of Ray's logs.
        advice: what to do about it, if that is known.
    """
    try:
        attempt = run.newest("attempt")
    except OSError:  # the storage may be why it failed
        attempt = None
    nodes = attempt.get("nodes", []) if attempt else []
    rows = [("cause", f"{cause.kind}: {cause.message[:1000]}")]
    if cause.where:
        rows.append(("at", cause.where))
    if cause.rank is not None:
        # What the worker said goes before: it may have failed before its attempt was written down.
        node = cause.node or (nodes[cause.rank] if cause.rank < len(nodes) else "unknown")
        rows.append(("worker", f"rank {cause.rank} on node {node}"))
    if advice:
        rows.append(("try", advice))
    rows.append(("ledger", run.ledger))
    rows.append(("report", f"{run.storage.location}/{REPORT}"))
    rows.append(("logs", f"{logs} (on that node)"))
    width = max(len(name) for name, _ in rows)
    # No frame around it and no wrapping: paths are there to be copied.
    print("── training failed " + "─" * 61, file=sys.stderr)
    for name, value in rows:
        print(f"{name:<{width}}  {value}", file=sys.stderr)
    print("─" * 80, file=sys.stderr, flush=True)
