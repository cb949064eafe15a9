"""make bench: measure side by side. `python -m tests.bench saves --rounds 5`"""

import argparse

from . import report, saves

PARTS = {"saves": saves.run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts", nargs="*", default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}; default all"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of every arm in turn")
    parser.add_argument("--json", default="/tmp/areal_ray_bench.json", metavar="FILE")
    arguments = parser.parse_args()
    results = []
    for part in arguments.parts:
        results += PARTS[part](arguments.rounds)
    report.write(arguments.json, results)


if __name__ == "__main__":
    main()
