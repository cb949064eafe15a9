"""Run checks on clusters of their own, all or those that are named: `make clusters NAMES="two_runs retries sweep"`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.clusters import retries, sweeps, two_runs

CHECKS: dict[str, Callable[[Path], None]] = {
    "two_runs": two_runs.check,
    "one_after_the_other": two_runs.check_room_for_one,
    "retries": retries.check,
    "sweep": sweeps.check_asha,
    "population": sweeps.check_pbt,
}


def main(names: Sequence[str]) -> int:
    """Run checks; each says what it has seen, and ends with an AssertionError if that is not as promised."""
    if unknown := [name for name in names if name not in CHECKS]:
        print(f"no check {unknown[0]!r}; there are: {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    for name in names or CHECKS:
        print(f"{name}: {CHECKS[name].__doc__}", flush=True)
        with tempfile.TemporaryDirectory(prefix="areal_ray-clusters-") as folder:
            CHECKS[name](Path(folder))
        print(f"{name}: as promised", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
