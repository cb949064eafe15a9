"""areal-ray init: a folder to begin with."""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path

_NAMES = {"rayignore": ".rayignore"}  # of files that would be hidden in the package


def add_init(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "write an experiment, parts of one's own, a Makefile and a Dockerfile into a folder; it trains at once"
    command = commands.add_parser("init", help=text, description=text)
    command.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="default: the current one")
    command.set_defaults(run=_init)


def _init(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.folder)
    files = {
        _NAMES.get(file.name, file.name): file for file in resources.files("areal_ray.cli").joinpath("start").iterdir()
    }
    files = {name: file for name, file in files.items() if file.is_file()}
    if taken := sorted(name for name in files if (folder / name).exists()):
        print(f"areal-ray init: {folder} has {', '.join(taken)} already", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in sorted(files.items()):
        (folder / name).write_bytes(file.read_bytes())
    there = "" if folder.resolve() == Path.cwd() else f"cd {folder} && "
    print(f"wrote {', '.join(sorted(files))}\ntry:  {there}areal-ray train --config experiment.yaml")
    return 0
