"""areal-ray: train an experiment, submit it to a cluster, look at runs and checkpoints."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from areal_ray import __version__
from areal_ray.cli.ckpt import add_ckpt
from areal_ray.cli.data import add_data
from areal_ray.cli.doctor import doctor
from areal_ray.cli.evaluate import add_evaluate
from areal_ray.cli.jobs import add_address, add_jobs, submit
from areal_ray.cli.manifest import add_manifest, manifest
from areal_ray.cli.output import losable_output
from areal_ray.cli.runs import add_runs
from areal_ray.cli.start_project import add_init
from areal_ray.cli.sweep import sweep

if TYPE_CHECKING:
    from areal_ray.tools.verify_resume import Check


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0 done, 1 failed (diff: different), 2 wrong arguments or configuration.
    """
    parser = argparse.ArgumentParser(prog="areal-ray", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="run an experiment here, or on the cluster of RAY_ADDRESS")
    _add_experiment(train, _train)
    train.add_argument("--dry-run", action="store_true", help="only look, as `areal-ray doctor` does")
    submitting = commands.add_parser("submit", help="run an experiment as a job of a running cluster")
    _add_experiment(submitting, _submit)
    add_address(submitting)
    waits = submitting.add_mutually_exclusive_group()
    waits.add_argument("--wait", action="store_true", help="show its output until it ends (the default)")
    waits.add_argument("--detach", action="store_true", help="only submit it")
    text = "submit a job again whose driver, or its node, has died (default 0)"
    submitting.add_argument("--retries", type=int, default=0, metavar="N", help=text)
    examine = commands.add_parser("doctor", help="look at everything that a run will meet, before it starts")
    _add_experiment(examine, lambda arguments: _with_config(arguments, lambda config: doctor(config, arguments)))
    add_jobs(commands)
    many = commands.add_parser("sweep", help="many runs of an experiment with other values, on Ray Tune")
    many.add_argument("--space", required=True, metavar="FILE", help="what is tried, see the README")
    _add_experiment(many, lambda arguments: _with_config(arguments, lambda config: sweep(config, arguments)))
    render = commands.add_parser("manifest", help="the experiment for KubeRay, Anyscale, Docker, SLURM or systemd")
    add_manifest(render)
    _add_experiment(render, lambda arguments: _with_config(arguments, lambda config: manifest(config, arguments)))
    verify = commands.add_parser(
        "verify-resume", help="run an experiment undisturbed, with kills and at other numbers of workers, and compare"
    )
    _add_experiment(verify, _verify)
    verify.add_argument("--kills", type=int, default=3, help="in each of the disturbed runs (default 3)")
    verify.add_argument("--seed", type=int, default=0, help="of the steps and ranks that are killed (default 0)")
    verify.add_argument("--bound", type=float, help="how far apart, |a-b| / |a|, other numbers of workers may end")
    verify.add_argument("--folder", help="where the runs stay, a path that all nodes see; default a temporary one")
    chaos = commands.add_parser("chaos", help="disturb an experiment with real faults, and check that nothing is lost")
    _add_experiment(chaos, _chaos)
    chaos.add_argument("--minutes", type=float, default=15, help="of disturbed training (default 15)")
    chaos.add_argument("--seed", type=int, default=0, help="of order, targets and moments of the faults (default 0)")
    chaos.add_argument(
        "--storage-process", type=int, metavar="PID", help="of a storage server on this machine, to stop"
    )
    chaos.add_argument(
        "--machines",
        action="store_true",
        help="a network namespace for each worker, and faults of the network; as root",
    )
    chaos.add_argument("--only", action="append", metavar="KIND", help="only faults of this kind; may be repeated")
    chaos.add_argument("--folder", help="where the runs and their logs stay; default a temporary one")
    add_init(commands)
    add_runs(commands)
    add_ckpt(commands.add_parser("ckpt", help="look at checkpoints"))
    add_evaluate(commands.add_parser("evaluate", help="a checkpoint on held-out data, apart from training"))
    making = commands.add_parser("prepare", help="make an experiment's prepared corpus, as train does by itself")
    _add_experiment(making, _prepare)
    add_data(commands.add_parser("data", help="look at prepared corpora"))
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes positional arguments in one run only: --config FILE a=1 --detach b=2 leaves b=2.
    if rest and (not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    with losable_output() as output:
        try:
            status = int(arguments.run(arguments))
        except KeyboardInterrupt:  # where there is nothing to be saved, as in `train`, once it trains
            more = "; the same command goes on with what is finished" if arguments.run in (_train, _prepare) else ""
            print(f"areal-ray: interrupted{more}", file=sys.stderr)
            status = 128 + signal.SIGINT
    # Of these the output is not what they are for; of all others it is.
    works = arguments.run in (_train, _submit, _verify, _chaos, _prepare) and not arguments.print_config
    if output.lost is None:
        return status
    if isinstance(output.lost, BrokenPipeError):  # the reader has seen enough, as in `areal-ray ckpt diff A B | head`
        return status if works else 128 + signal.SIGPIPE
    print(f"areal-ray: the output could not be written: {output.lost.strerror}", file=sys.stderr)
    return status if works else status or 1


def _add_experiment(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="for example conf/experiments/tiny.yaml")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=500")
    parser.set_defaults(run=run)


def _train(arguments: argparse.Namespace) -> int:
    train = doctor if arguments.dry_run else _driver_train
    return _with_config(arguments, lambda config: train(config, arguments))


def _submit(arguments: argparse.Namespace) -> int:
    return _with_config(arguments, lambda config: submit(config, arguments))


def _prepare(arguments: argparse.Namespace) -> int:
    def prepare(config: Any) -> int:
        from areal_ray.driver.connect import use_token

        if os.environ.get("RAY_ADDRESS"):
            use_token()
        from areal_ray.driver.data import prepare_all

        prepare_all(config, lambda text: print(text, flush=True))
        return 0

    return _with_config(arguments, prepare)


def _verify(arguments: argparse.Namespace) -> int:
    def verify(folder: Path) -> list[Check]:
        from areal_ray.tools.verify_resume import verify_resume

        return verify_resume(
            arguments.config, arguments.overrides, folder, arguments.seed, arguments.kills, arguments.bound
        )

    return _with_config(arguments, lambda _: _prove(arguments, "verify-resume", verify))


def _chaos(arguments: argparse.Namespace) -> int:
    def disturb(folder: Path) -> list[Check]:
        from areal_ray.tools.chaos.main import chaos

        places = arguments.config, arguments.overrides, folder
        only, own = arguments.only or (), (arguments.storage_process, arguments.machines)
        injected, checks = chaos(*places, arguments.minutes, arguments.seed, only, *own)
        print(f"\n{len(injected)} faults of {len({fault.kind for fault in injected})} kinds")
        return checks

    return _with_config(arguments, lambda _: _prove(arguments, "chaos", disturb))


def _prove(arguments: argparse.Namespace, name: str, work: Callable[[Path], list[Check]]) -> int:
    """Runs a tool that checks promises, in a folder, and prints its table of checks."""
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix=f"areal_ray-{name}-")).resolve()
    if folder.is_dir() and any(folder.iterdir()):
        print(f"areal-ray {name}: {folder} is not empty", file=sys.stderr)
        return 2
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    try:
        checks = work(folder)
    except RuntimeError as error:
        print(f"\nareal-ray {name}: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    width = max(len(check.what) for check in checks)
    print(f"\n{'run':<9} {'what':<{width}}  {'promised':<18} {'found':<32}")
    for check in checks:
        verdict = "ok" if check.kept else "NOT KEPT"
        print(f"{check.run:<9} {check.what:<{width}}  {check.promised:<18} {check.found:<32} {verdict}")
    if all(check.kept for check in checks):
        print("\nall as promised")
        if not arguments.folder:
            shutil.rmtree(folder)
        return 0
    print(f"\nnot as promised; the runs are in {folder}")
    return 1


def _driver_train(config: Any, arguments: argparse.Namespace) -> int:
    # Before Ray and torch are imported, which takes seconds: a sign of life.
    print(f"areal_ray {__version__}: {config.run.name}, {config.length}", flush=True)
    from areal_ray.config import plugin
    from areal_ray.driver.connect import PREPARATION, answering, cluster, is_off, unreachable, use_token
    from areal_ray.processes.fork_server import fork_server_for

    if os.environ.get("RAY_ADDRESS"):
        use_token()
        if problem := unreachable():  # Ray would try for a minute, and then say so on a page
            print(f"areal-ray: {problem}", file=sys.stderr)
            return 2
    # A process that has imported Ray may have a cluster, too.
    fork_server = fork_server_for(config, PREPARATION) if "ray" not in sys.modules and not is_off(config) else None
    try:
        # A cluster that runs is asked for the first processes before this one imports what it needs itself.
        with ExitStack() as early:
            if answering() and not is_off(config):
                early.enter_context(cluster(config, fork_server))
            return _drive(config, arguments.overrides, fork_server, plugin.search_path(arguments.config), early)
    finally:
        if fork_server:
            fork_server.close()


def _drive(
    config: Any, overrides: Sequence[str], fork_server: Any, search_path: tuple[str, ...], early: ExitStack
) -> int:
    from areal_ray.driver.main import train  # imports Ray and torch: seconds that a typing error need not wait for

    return train(config, overrides, fork_server, search_path, early)


def _with_config(arguments: argparse.Namespace, run: Callable[[Any], int]) -> int:
    from areal_ray.config import Config, ConfigError, dump, load, plugin

    plugin.extend_path(plugin.search_path(arguments.config))
    try:
        config = load(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(dump(config), end="")
            return 0
        try:
            return run(config)
        except ConfigError as error:  # found while looking at files, models and the run directory
            if error.source:  # another file than the experiment
                raise
            from areal_ray.config.layers import read_layers, source_of

            layers = read_layers(arguments.config, arguments.overrides, Config)
            raise ConfigError(error.key, error.message, source_of(error.key, layers)) from None
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
