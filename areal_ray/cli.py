"""areal-ray: train an experiment, submit it to a cluster, look at its checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from areal_ray.storage import Storage


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 1 failed (diff: different), 2 wrong arguments or configuration."""
    parser = argparse.ArgumentParser(prog="areal-ray", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_experiment(
        commands.add_parser("train", help="run an experiment here, or on the cluster of RAY_ADDRESS"), _train
    )
    _add_experiment(commands.add_parser("submit", help="run an experiment as a job of a running cluster"), _submit)
    _add_ckpt(commands.add_parser("ckpt", help="look at checkpoints"))
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


def _add_ckpt(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, paths, text in (
        ("ls", _ls, ["RUN"], "the checkpoints of a run directory"),
        ("inspect", _inspect, ["CKPT"], "what a checkpoint holds and where it comes from"),
        ("verify", _verify, ["CKPT"], "read every byte and compare it with the manifest"),
        ("digest", _digest, ["CKPT"], "one SHA-256 of the logical state, the same for any number of ranks"),
        ("diff", _diff, ["A", "B"], "compare two states bit for bit; exit 0 if and only if they are the same"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        for path in paths:
            command.add_argument("run_dir" if path == "RUN" else path.lower(), metavar=path)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=lambda arguments, run=run: _ckpt(run, arguments))


def _ckpt(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    from areal_ray.checkpoint import CheckpointDamaged

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `areal-ray ckpt diff A B | head` ends quietly
    try:
        return run(arguments)
    except (CheckpointDamaged, ValueError) as error:
        print(f"areal-ray ckpt: {error}", file=sys.stderr)
        return 1


def _at(path: str) -> Storage:
    from areal_ray.storage import storage_at

    storage = storage_at(path)
    if not storage.names():
        raise ValueError(f"{storage.location}: nothing there")
    return storage


def _ls(arguments: argparse.Namespace) -> int:
    from areal_ray import ckpt

    rows = ckpt.listing(_at(arguments.run_dir))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'name':<20} {'step':>8} {'ranks':>5} {'size':>10}  {'saved':<19}  state")
    for row in rows:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:,.1f} MB"
        ranks, saved = row["world_size"] or "", row["saved"] or ""
        print(f"{row['name']:<20} {row['step']:>8} {ranks:>5} {size:>10}  {saved:<19}  {row['state']}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from areal_ray import ckpt

    found = ckpt.inspection(_at(arguments.ckpt))
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for key, value in found["info"].items():
        print(f"{key:<12} {value if not isinstance(value, dict) else json.dumps(value)}")
    print(f"{'bytes':<12} {found['bytes']:,} in {len(found['files'])} files\n\nvalues")
    print("\n".join(f"  {line}" for line in json.dumps(found["values"], indent=2).splitlines()))
    print(f"\n{len(found['tensors'])} tensors")
    for name, (dtype, shape) in found["tensors"].items():
        print(f"  {name}  {dtype} {'x'.join(map(str, shape)) or 'scalar'}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from areal_ray import ckpt

    size = ckpt.check(_at(arguments.ckpt))
    print(json.dumps({"good": True, "bytes": size}) if arguments.json else f"good: {size:,} bytes read and compared")
    return 0


def _digest(arguments: argparse.Namespace) -> int:
    from areal_ray import ckpt

    value = ckpt.digest(_at(arguments.ckpt))
    print(json.dumps({"sha256": value}) if arguments.json else value)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from areal_ray import ckpt

    found = ckpt.differences(_at(arguments.a), _at(arguments.b))
    if arguments.json:
        print(json.dumps([vars(difference) for difference in found], indent=2))
    elif not found:
        print("bit-identical")
    else:
        for difference in found:
            apart = "" if difference.max_abs is None else f", max |a-b| {difference.max_abs:.3g}"
            print(f"{difference.name}: {difference.what}{apart}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
