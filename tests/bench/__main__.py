"""make bench: measure side by side. `python -m tests.bench saves restart --rounds 5`"""

import argparse
import importlib.util
import os
import signal
import sys
import traceback
from importlib import import_module
from types import ModuleType

from . import bounds, report
from .arms import MODELS
from .launch import environment
from .options import Options, arm_and_steps

PARTS = {
    "limits": "memory copy, sequential write with fsync, multipart PUT",
    "throughput": "steady-state tokens/s without saves; step time with standbys on and off",
    "trackers": "steady-state tokens/s with all trackers on, beside none",
    "start": "command to first finished step on a running cluster",
    "saves": "blocked and effective time per save; staged to committed",
    "loads": "load time at the same and another world size",
    "first": "the first save after a restart beside later ones, 30M parameters",
    "restart": "SIGKILL (and SIGSTOP) of a worker to the next finished step; steps lost",
    "nodes": "a node with a worker removed to the next finished step",
    "goodput": "tokens that count per second under a Poisson schedule of kills",
    "metadata": "CPU, bytes and peak of a load and a save beside their tensors, 2 to 32 ranks",
    "scale": "simulated: planning, commit and metadata of a restore for 64, 256 and 1,024 ranks of a 70B model",
    "losses": "tokens that count per second while workers and nodes are lost, beside none lost",
    "long": "start, restart, list and save with 10 and 1,000 checkpoints, and after 100 and 10^6 lines of logs",
    "accumulate": "peak memory and speed of a step with several micro-batches, gradients sharded and not",
    "loss": "peak memory and speed of a step at a vocabulary of 128k, with all logits at once and without",
    "memory": "peak proportional set size, /dev/shm included",
    "data": "13 MB and 1 GB of text: preparing (beside datasets.map), start, restart, memory of a rank; a corpus on S3",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="parts: " + "; ".join(f"{name}: {what}" for name, what in PARTS.items()),
    )
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help="default all, which takes hours")
    parser.add_argument("--rounds", type=int, default=5, help="of every arm in turn")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="of the parts' arms")
    parser.add_argument("--seconds", type=float, default=300.0, help="of a run under kills (goodput, losses)")
    parser.add_argument(
        "--saves",
        nargs="+",
        type=arm_and_steps,
        default=[],
        metavar="ARM=STEPS",
        help="steps between two saves (goodput)",
    )
    parser.add_argument("--model", choices=MODELS, default="tiny", help="of restart and saves")
    parser.add_argument("--json", default=report.DEFAULT_PATH, metavar="FILE")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    saves = dict(arguments.saves)
    if saves and "goodput" not in arguments.parts:
        parser.error("--saves is about the part goodput, which is not among these")
    if idle := [arm for arm in saves if arguments.only and arm not in arguments.only]:
        parser.error(f"--saves names {', '.join(idle)}, which --only leaves out")
    same = environment()  # for what runs in this process too; Ray reads some of it when it is imported
    os.environ.clear()
    os.environ.update(same)
    parts = {name: import_module(f".{name}", __package__) for name in arguments.parts}
    known = dict.fromkeys(arm for part in parts.values() for arm in _arms(part))
    if unknown := [arm for arm in (*arguments.only, *saves) if arm not in known]:
        parser.error(f"no arm {', '.join(unknown)}; these parts have {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    options = Options(arguments.rounds, tuple(arguments.only), arguments.seconds, saves, MODELS[arguments.model])
    return measure(parts, options, arguments.json)


def draw(path: str) -> None:
    """Draw what the file of results has, beside it: where matplotlib is, of the extra `bench`."""
    if importlib.util.find_spec("matplotlib") is None:
        print("\nno pictures are drawn: matplotlib is not installed (pip install 'areal_ray[bench]')")
        return
    from . import pictures

    folder = os.path.splitext(path)[0]
    drawn = pictures.draw(path, folder)
    print(f"\npictures: {', '.join(drawn)} in {folder}" if drawn else "\nnothing to draw a picture of")


def _arms(part: ModuleType) -> tuple[str, ...]:
    return getattr(part, "ARMS", ())


def measure(parts: dict[str, ModuleType], options: Options, path: str) -> int:
    """Run the parts; results are kept after each, and one that fails does not end the others. The exit status."""
    about = report.context(rounds=options.rounds, seconds=options.seconds)
    results, failed = [], []
    for name, part in parts.items():
        if options.only and _arms(part) and not set(options.only) & set(_arms(part)):
            print(f"part {name} has none of these arms")
            continue
        try:
            results += part.run(options)
        except Exception:  # noqa: BLE001  (hours of other parts are to come)
            traceback.print_exc()
            failed.append(name)
        report.write(path, results, about)
    print("\nsummary")
    for result in results:
        report.print_table(result)
    if lines := bounds.judge(results):
        print("\n".join(["\npromised", *lines]))
    if results:
        draw(path)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
