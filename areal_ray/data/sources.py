"""Sources of documents: names and bytes, in an order that is the same on every machine."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from areal_ray.config import ConfigError, DataConfig

# Not written as prose to learn from: test data with broken encodings, installed packages, generated tables.
_STDLIB_SKIPS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "encodings"}


def documents(config: DataConfig) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every document, sorted by name.

    Raises:
        ConfigError: if there is nothing to read, or a file cannot be read.
    """
    for name, path in named_files(config):
        try:
            yield name, path.read_bytes()
        except OSError as error:
            raise ConfigError("data.paths", f"cannot read {path}: {error.strerror}") from None


def named_files(config: DataConfig) -> list[tuple[str, Path]]:
    """(name, path) of every file, sorted by name."""
    return _stdlib() if config.source == "stdlib" else _text(config.paths)


def _stdlib() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    kept = []
    for folder, folders, files in os.walk(root):
        # Not gone into, rather than left out afterwards: installed packages are many times as much as the rest.
        folders[:] = [name for name in folders if name not in _STDLIB_SKIPS]
        paths = [Path(folder, name) for name in files if name.endswith(".py")]
        kept += [(path.relative_to(root).as_posix(), path) for path in paths]
    if not kept:
        raise ConfigError("data.source", f"this Python has no standard library source in {root}; use source: text")
    return sorted(kept)


def _text(patterns: Sequence[str]) -> list[tuple[str, Path]]:
    found: set[Path] = set()
    for pattern in patterns:
        place = Path(os.path.expanduser(pattern))
        # What there is is itself before it is a pattern: a folder may have brackets in its name.
        matches = [place] if place.exists() else [Path(match) for match in glob.glob(str(place), recursive=True)]
        files = [f for m in matches for f in (m.rglob("*") if m.is_dir() else [m]) if f.is_file()]
        if not files:
            raise ConfigError("data.paths", f"no file matches {pattern!r}")
        found.update(file.resolve() for file in files)
    # Names, and with them the split and the order, do not depend on where the corpus lies.
    parts = [path.parts for path in found]
    common = 0
    while len(found) > 1 and all(len(p) > common + 1 for p in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    return sorted(("/".join(path.parts[common:] if len(found) > 1 else path.parts[-1:]), path) for path in found)
