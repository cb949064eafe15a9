"""make bench: measure side by side. `python -m tests.bench saves restart --rounds 5`"""

import argparse
import signal
import sys
from importlib import import_module

from . import report
from .options import Options

PARTS = {
    "limits": "memory copy, sequential write with fsync, multipart PUT",
    "throughput": "steady-state tokens/s without saves; step time with standbys on and off",
    "start": "command to first finished step on a running cluster",
    "saves": "blocked and effective time per save; staged to committed",
    "loads": "load time at the same and another world size",
    "restart": "SIGKILL (and SIGSTOP) of a worker to the next finished step; steps lost",
    "nodes": "a node with a worker removed to the next finished step",
    "goodput": "tokens that count per second under a Poisson schedule of kills",
    "memory": "peak proportional set size, /dev/shm included",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="parts: " + "; ".join(f"{name}: {what}" for name, what in PARTS.items()),
    )
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help="default all, which takes hours")
    parser.add_argument("--rounds", type=int, default=5, help="of every arm in turn")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="of the parts' arms")
    parser.add_argument("--seconds", type=float, default=300.0, help="of a run under kills (goodput)")
    parser.add_argument("--json", default="/tmp/areal_ray_bench.json", metavar="FILE")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    options = Options(arguments.rounds, tuple(arguments.only), arguments.seconds)
    results = []
    for part in arguments.parts:
        results += import_module(f".{part}", __package__).run(options)
        report.write(arguments.json, results)  # after every part: the next one may fail


if __name__ == "__main__":
    main()
