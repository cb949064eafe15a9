"""areal-ray evaluate: a checkpoint on held-out data, apart from training."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from typing import Any


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.micro_batch_size=1")
    parser.add_argument("--config", metavar="FILE", help="the experiment; default what the checkpoint says")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, directories or globs; default the run's held-out data",
    )
    parser.add_argument("--source", help="as data.source: text, jsonl, ...; default by the suffix of the files")
    parser.add_argument("--tokenizer", help="as data.tokenizer; default that of the run, if it is bytes")
    parser.add_argument("--rows", type=int, metavar="N", help="at most so many rows of each set; default all")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from areal_ray.checkpoint import CheckpointDamaged
    from areal_ray.config import ConfigError, plugin
    from areal_ray.distributed import RankError
    from areal_ray.driver.evaluate import Asked, evaluate

    plugin.extend_path(plugin.search_path(arguments.config) if arguments.config else ())
    names = ("checkpoint", "config", "overrides", "data", "source", "tokenizer", "rows")
    # Of one list after --data: what is key=value is no file.
    asked = {name: getattr(arguments, name) for name in names}
    asked["overrides"] = [*asked["overrides"], *(text for text in asked["data"] if "=" in text)]
    asked["data"] = [text for text in asked["data"] if "=" not in text]
    try:
        if arguments.rows is not None and arguments.rows < 1:
            raise ConfigError("--rows", f"must be greater than 0, not {arguments.rows}", "command line")
        with redirect_stdout(sys.stderr):  # remarks on what is loaded; the result alone goes where it is read from
            found = evaluate(Asked(**asked))
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        return 2
    except RankError as error:
        if error.only(ConfigError):  # found by the rank that prepares the data
            print(f"config error: {error.failures[0][1].removeprefix('ConfigError: ')}", file=sys.stderr)
            return 2
        print(f"areal-ray evaluate: {error}", file=sys.stderr)
        return 1
    except (CheckpointDamaged, ValueError, OSError) as error:
        print(f"areal-ray evaluate: {error}", file=sys.stderr)
        return 1
    _print(found, arguments.json)
    return 0


def _print(found: dict[str, dict[str, Any]], as_json: bool) -> None:
    import os

    if int(os.environ.get("RANK", "0")):  # of several ranks, one tells
        return
    if as_json:
        print(json.dumps(found, indent=2))
        return
    names = list(dict.fromkeys(name for each in found.values() for name in each if name != "rows"))
    width = max(len("set"), *(len(name) for name in found))
    print("  ".join([f"{'set':<{width}}", f"{'rows':>9}", *(f"{name.replace('_', ' '):>13}" for name in names)]))
    for name, each in found.items():
        values = [f"{each[key]:>13.4f}" if key in each else " " * 13 for key in names]
        print("  ".join([f"{name:<{width}}", f"{each.get('rows', 0):>9,}", *values]))
