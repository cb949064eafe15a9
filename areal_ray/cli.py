"""areal-ray: train an experiment, submit it to a cluster, look at its checkpoints."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from areal_ray.cli_ckpt import add_ckpt


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 1 failed (diff: different), 2 wrong arguments or configuration."""
    parser = argparse.ArgumentParser(prog="areal-ray", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_experiment(
        commands.add_parser("train", help="run an experiment here, or on the cluster of RAY_ADDRESS"), _train
    )
    _add_experiment(commands.add_parser("submit", help="run an experiment as a job of a running cluster"), _submit)
    add_ckpt(commands.add_parser("ckpt", help="look at checkpoints"))
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


def _add_experiment(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="for example conf/experiments/tiny.yaml")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=500")
    parser.set_defaults(run=run)


def _train(arguments: argparse.Namespace) -> int:
    return _with_config(arguments, lambda config: _driver_train(config, arguments.overrides))


def _submit(arguments: argparse.Namespace) -> int:
    def submit(_: Any) -> int:
        from areal_ray.submit import submit

        return submit(arguments.config, arguments.overrides)

    return _with_config(arguments, submit)


def _driver_train(config: Any, overrides: Sequence[str]) -> int:
    if os.environ.get("RAY_ADDRESS"):
        from areal_ray.cluster import use_token

        use_token()
    from areal_ray.driver import train  # imports Ray and torch: seconds that a typing error need not wait for

    return train(config, overrides)


def _with_config(arguments: argparse.Namespace, run: Callable[[Any], int]) -> int:
    from areal_ray.config import ConfigError, dump, load

    try:
        config = load(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(dump(config), end="")
            return 0
        try:
            return run(config)
        except ConfigError as error:  # found while looking at files, models and the run directory
            from areal_ray.config_layers import read_layers, source_of

            layers = read_layers(arguments.config, arguments.overrides)
            raise ConfigError(error.key, error.message, source_of(error.key, layers)) from None
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
