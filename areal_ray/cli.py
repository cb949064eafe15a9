"""areal-ray: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 1 failed, 2 wrong arguments or configuration."""
    parser = argparse.ArgumentParser(prog="areal-ray", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_train(commands.add_parser("train", help="run an experiment"))
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="an experiment, for example conf/experiments/tiny.yaml")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=500 model=tiny")
    parser.set_defaults(run=run_train)


def run_train(arguments: argparse.Namespace) -> int:
    from areal_ray.config import ConfigError, dump, load

    try:
        config = load(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(dump(config), end="")
            return 0
        from areal_ray import driver

        return driver.train(config, arguments.overrides)
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        return 2
