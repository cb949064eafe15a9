"""make fuzz N=20000 SEED=0, CASE=17 to repeat one."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from tests.fuzz import cases, seeds
from tests.fuzz.pool import run_cases
from tests.fuzz.verdicts import BAD, GOOD, Verdict

_SHOWN = 40


def main() -> int:
    """Runs the cases and prints a table of their outcomes; 1 if there is one that must not be."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="repeat this one")
    parser.add_argument("--only", action="append", choices=list(cases.CASES), help="may be repeated")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the forks' own would wait for threads that are not there
    numbers = range(arguments.cases) if arguments.case is None else [arguments.case]
    counts: Counter[tuple[str, str]] = Counter()
    failed: list[tuple[int, str, Verdict]] = []
    began = time.monotonic()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="areal_ray-fuzz-", dir=memory) as name:
        folder = Path(name)
        made = seeds.make(folder / "seeds")
        only = arguments.only or list(cases.CASES)

        def case(number: int) -> tuple[str, Verdict]:
            return cases.run(made, arguments.seed, number, only, folder / str(number))

        for number, kind, verdict in run_cases(numbers, partial(case), arguments.processes):
            counts[kind or "(ended)", verdict.what] += 1
            if verdict.what in BAD:
                failed.append((number, kind, verdict))
            if arguments.case is not None:
                print(f"{kind}: {verdict.what} {verdict.text}")
    for number, kind, verdict in sorted(failed, key=lambda each: each[0])[:_SHOWN]:
        print(f"seed {arguments.seed} case {number} ({kind}): {verdict.what}: {verdict.text}")
    _table(counts)
    total, seconds = sum(counts.values()), time.monotonic() - began
    print(f"{total} cases in {seconds:.0f} s, {len(failed)} that must not be (make fuzz SEED={arguments.seed} CASE=n)")
    return 1 if failed or total != len(numbers) else 0


def _table(counts: Counter[tuple[str, str]]) -> None:
    outcomes = [*GOOD, *BAD]
    print(f"{'':<20}" + "".join(f"{each:>14}" for each in outcomes))
    for kind in [*dict.fromkeys(kind for kind, _ in sorted(counts))]:
        print(f"{kind:<20}" + "".join(f"{counts[kind, each]:>14}" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
