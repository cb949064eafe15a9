"""areal-ray data: the commands about prepared corpora and their output."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable


def add_data(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("ls", _ls, "the prepared corpora in a folder"),
        ("inspect", _inspect, "what a corpus holds and was made of"),
        ("verify", _verify, "read every byte and compare it with the manifest"),
        ("sample", _sample, "print some documents as they are trained on: where they end, and what is predicted"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", metavar="PATH", help="a corpus, a run that trains on it, or a folder of corpora")
        command.add_argument("--json", action="store_true", help="print JSON")
        if run is _sample:
            command.add_argument("--count", type=int, default=3, help="documents (default 3)")
            command.add_argument("--split", choices=("train", "held_out"), default="train", help="default train")
            command.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
            command.add_argument("--tokens", type=int, default=400, help="shown of each at most (default 400)")
        command.set_defaults(run=lambda arguments, run=run: _data(run, arguments), print_config=False)


def _data(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    from areal_ray.config import ConfigError

    try:
        return run(arguments)
    except (ConfigError, ValueError, OSError) as error:
        print(f"areal-ray data: {error}", file=sys.stderr)
        return 1


def _ls(arguments: argparse.Namespace) -> int:
    from areal_ray.tools import corpora

    rows = corpora.listing(arguments.path)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'name':<16} {'source':<10} {'documents':>12} {'tokens':>16} {'size':>12}  path")
    for row in rows:
        counts = f"{row['documents']:>12,} {row['tokens']:>16,} {row['bytes'] / 1e6:>9,.1f} MB"
        print(f"{row['name']:<16} {row['source']:<10} {counts}  {row['path']}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from areal_ray.tools import corpora

    found = {name: corpora.inspection(each.manifest) for name, each in corpora.corpora_at(arguments.path).items()}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, about in found.items():
        print(name)
        for key, value in about.items():
            print(f"  {key:<12} {value if not isinstance(value, dict) else json.dumps(value)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from areal_ray.tools import corpora

    status, found = 0, {}
    for name, corpus in corpora.corpora_at(arguments.path).items():
        bad = corpora.damaged(corpus.storage, corpus.manifest)
        size = sum(about["bytes"] for about in corpus.manifest.files.values())
        found[name] = {"good": not bad, "bytes": size, "damaged": bad}
        status = status or int(bool(bad))
        if not arguments.json:
            verdict = f"damaged: {', '.join(bad)}" if bad else f"good: {size:,} bytes read and compared"
            print(f"{name}  {verdict}")
    if arguments.json:
        print(json.dumps(found, indent=2))
    return status


def _sample(arguments: argparse.Namespace) -> int:
    from areal_ray.tools import corpora

    begin, end = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    drawn = {
        name: (corpus, corpora.samples(corpus, arguments.split, arguments.count, arguments.seed, arguments.tokens))
        for name, corpus in corpora.corpora_at(arguments.path).items()
    }
    if arguments.json:
        print(json.dumps({name: [vars(sample) for sample in found] for name, (_, found) in drawn.items()}, indent=2))
        return 0
    for name, (corpus, found) in drawn.items():
        marked = any(shard.masked for shard in corpus.manifest.splits[arguments.split])
        print(f"{name}: " + (f"{begin}predicted tokens{end} are marked" if marked else "all tokens are predicted"))
        for sample in found:
            print(f"── document {sample.document + 1:,} of {sample.documents:,}, {sample.tokens:,} tokens " + "─" * 20)
            print("".join(f"{begin}{text}{end}" if marked and said else text for text, said in sample.runs))
            if sample.cut:
                print("…")
    return 0
